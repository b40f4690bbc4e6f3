// Training runs, a line each: what they do, how far they are, and what is left. See mistral_ft/review_runs.py.

import { get } from "./api.js";
import { $, count, h } from "./dom.js";

const OFTEN = 3000; // milliseconds between two looks while a run is at work
const SELDOM = 15000; // else
const SILENT = 120; // seconds without news that are told

const WORKING = new Set(["preparing", "training", "evaluating", "saving"]);

/** Seconds as 05:40 or 1:02:03. */
function clock(seconds) {
  const parts = [Math.floor(seconds / 60) % 60, Math.floor(seconds) % 60].map((part) => String(part).padStart(2, "0"));
  const hours = Math.floor(seconds / 3600);
  return (hours ? `${hours}:` : "") + parts.join(":");
}

function line(run, dialog) {
  const working = WORKING.has(run.state);
  const state = run.state === "dead" ? "dead, its process is gone" : run.state;
  const showPlot = () =>
    dialog(run.name, h("img", { id: "plot", src: `/api/plot?${new URLSearchParams({ run: run.name, age: Date.now() })}`, alt: `Loss of ${run.name} by step` }));
  const numbers = [
    run.step !== null && run.steps !== null && `step ${count(run.step)} of ${count(run.steps)}`,
    run.loss !== null && `loss ${run.loss.toFixed(4)}`,
    run.eval_loss !== null && `eval loss ${run.eval_loss.toFixed(4)}`,
    working && run.seconds_left !== null && `${clock(run.seconds_left)} left`,
    working && run.age > SILENT && `no news for ${clock(run.age)}`,
  ];
  return h(
    "div",
    { class: "run" },
    h("span", { class: "run-name", title: run.name }, run.name),
    h("span", { class: working ? "working" : run.state === "done" ? "done" : "ended", title: run.error }, run.error ? `${state}: ${run.error}` : state),
    numbers.filter(Boolean).map((text) => h("span", {}, text)),
    run.plot && h("button", { class: "link", onclick: showPlot }, "Loss curve"),
  );
}

/** Keep the lines up to date, as long as somebody sees them; `dialog(title, element)` shows a plot. */
export async function watchRuns(dialog) {
  for (;;) {
    let runs = [];
    try {
      ({ runs } = await get("runs"));
    } catch {
      // The header tells that the server is gone.
    }
    const focused = document.activeElement?.closest?.(".run")?.querySelector(".run-name").textContent;
    $("runs").replaceChildren(...runs.map((run) => line(run, dialog)));
    $("runs").hidden = !runs.length;
    for (const run of $("runs").children) {
      if (run.firstChild.textContent === focused) run.querySelector("button")?.focus();
    }
    await new Promise((done) => setTimeout(done, runs.some((run) => WORKING.has(run.state)) ? OFTEN : SELDOM));
    if (document.hidden) await new Promise((done) => document.addEventListener("visibilitychange", done, { once: true }));
  }
}
