// The page's conductor: what happens on the server, and what keys and buttons do.

import { get } from "./api.js";
import { accept, cancel, edit, flag, saveEdit, take, undo } from "./decisions.js";
import { $, count, notify, percent } from "./dom.js";
import { drawShows, drawValues, loadFields } from "./filters.js";
import { dialog, exportAll, help, scores, showBadLines, showTokens, toggleScores } from "./panels.js";
import { showRecord } from "./record.js";
import { enable, go, list, listFirst, openLink, pages, relist, show, step } from "./rows.js";
import { watchRuns } from "./runs.js";
import { state } from "./state.js";

const POLL = 1500; // milliseconds

// What happens on the server.

let polling = null;

async function poll() {
  clearTimeout(polling);
  try {
    await update(await get("status"));
  } catch (error) {
    $("reading").textContent = error.status === 0 ? "no connection" : error.message;
  }
  polling = setTimeout(poll, document.hidden ? 4 * POLL : POLL);
}

async function update(status) {
  const before = state.status;
  state.status = status;
  $("file").textContent = status.file;
  $("file").title = `images in ${status.images_dir}`;
  $("progress-bar").max = Math.max(1, status.rows);
  $("progress-bar").value = status.reviewed;
  $("progress-text").textContent = `${count(status.reviewed)} of ${count(status.rows)} reviewed`;
  $("reading").textContent = !status.ready
    ? `reading, ${percent(status.read, 0)}`
    : status.unfinished
      ? "predict is at work"
      : "";
  $("bad-lines").hidden = !status.bad_lines;
  $("bad-lines").textContent = `${count(status.bad_lines)} bad line${status.bad_lines === 1 ? "" : "s"}`;
  $("open-scores").hidden = !status.predicted;
  if (!before || before.predicted !== status.predicted || before.other !== status.other) {
    drawShows();
    enable();
  }
  if (!before) return;
  if (before.generation !== status.generation) {
    // Row numbers are other ones now: find the shown row by its id.
    const id = state.record?.id ?? null;
    const { row } = id === null ? { row: null } : await get("find", { id });
    state.undo = [];
    state.record = null;
    notify("The file was replaced; the list was made again.");
    await loadFields();
    await relist(row);
    return;
  }
  if (status.ready && !before.ready) loadFields();
  if (status.rows !== state.listed?.rows) {
    const { text, show, value, sort } = state.query;
    const quiet = !text && show === "all" && !value && sort === "file";
    const more = status.rows - (state.listed?.rows ?? 0);
    if (quiet || !before.ready || !state.record) await relist();
    else {
      $("newer").hidden = false;
      $("newer").textContent = `${count(more)} new row${more === 1 ? "" : "s"}: list again`;
    }
  }
  if (before.revision !== status.revision && !state.busy) {
    list.refresh();
    const record = state.record;
    if (record && !state.editing) {
      const now = await get("row", { row: record.row }).catch(() => null);
      if (now && state.record === record && now.review.version !== record.review.version) show(now);
    }
  }
}

// Keys and buttons.

const ACTIONS = {
  j: () => go(state.place + 1),
  ArrowDown: () => go(state.place + 1),
  k: () => go(state.place - 1),
  ArrowUp: () => go(state.place - 1),
  PageDown: () => go(Math.min(list.total - 1, state.place + 10)),
  PageUp: () => go(Math.max(0, state.place - 10)),
  Home: () => go(0),
  End: () => go(list.total - 1),
  n: () => step(false, "errors"),
  N: () => step(true, "errors"),
  a: accept,
  s: take,
  e: edit,
  f: flag,
  u: undo,
  "/": () => $("search").select(),
  "?": help,
  "+": () => pages.zoom(1.25),
  "=": () => pages.zoom(1.25),
  "-": () => pages.zoom(0.8),
  0: () => pages.fit("page"),
  w: () => pages.fit("width"),
  1: () => pages.actualSize(),
  r: () => pages.rotate(),
  "[": () => pages.open(pages.number - 1),
  "]": () => pages.open(pages.number + 1),
  m: toggleBy,
  v: showTokens,
  d: () => toggleScores(),
  Escape: () => toggleScores(false),
};

function toggleBy() {
  state.by = state.by === "words" ? "characters" : "words";
  if (state.record) showRecord(state.record, state.by);
  enable();
}

document.addEventListener("keydown", (event) => {
  if ($("dialog").open) return;
  const typing = event.target.matches("input, textarea, select");
  if (event.target.id === "edited") {
    if (event.key === "Escape") cancel();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) saveEdit();
    return;
  }
  if (event.target.id === "search") {
    if (event.key === "Escape" && !$("search").value) $("list").focus();
    if (event.key === "Enter" || event.key === "ArrowDown") $("list").focus();
    return;
  }
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.length === 1 && event.key !== "N" ? event.key.toLowerCase() : event.key;
  const inPanel = event.target.closest?.("#record-body, #scores") && /^(Arrow|Page|Home|End)/.test(key);
  const action = ACTIONS[key];
  if (!action || inPanel) return;
  event.preventDefault();
  action();
});

const CLICKS = {
  next: ACTIONS.j, previous: ACTIONS.k, accept, take, edit, flag, undo, cancel, by: toggleBy, tokens: showTokens,
  "zoom-in": ACTIONS["+"], "zoom-out": ACTIONS["-"], zoom: ACTIONS[1], "fit-page": ACTIONS[0], "fit-width": ACTIONS.w,
  rotate: ACTIONS.r, "open-scores": () => toggleScores(), "close-scores": () => toggleScores(false),
  "open-help": help, export: exportAll, "bad-lines": showBadLines, newer: () => relist(),
  "close-dialog": () => $("dialog").close(),
  revert: () => {
    $("edited").value = state.record.source_expected ?? "";
    state.drafts.set(state.record.key, $("edited").value);
  },
  "toggle-list": () => document.body.classList.toggle("list-hidden"),
  theme: () => setTheme(matchMedia("(prefers-color-scheme: dark)").matches === (currentTheme() === null) ? "light" : "dark"),
};
for (const [id, action] of Object.entries(CLICKS)) $(id).addEventListener("click", action);

$("editor").addEventListener("submit", (event) => {
  event.preventDefault();
  saveEdit();
});
$("edited").addEventListener("input", () => state.drafts.set(state.record.key, $("edited").value));

let typing = null;
$("search").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => {
    state.query.text = $("search").value;
    relist();
  }, 120);
});
$("sort").addEventListener("change", () => {
  state.query.sort = $("sort").value;
  relist();
});
$("field").addEventListener("change", () => {
  const filtered = state.query.value !== "";
  state.query.field = $("field").value;
  state.query.value = "";
  drawValues();
  if (filtered) relist();
});
$("field").addEventListener("focus", loadFields);
$("value").addEventListener("change", () => {
  state.query.value = $("value").value;
  relist();
});
$("slice-by").addEventListener("change", scores);
addEventListener("hashchange", openLink);
addEventListener("beforeunload", (event) => {
  if (state.drafts.size) event.preventDefault();
});

// Light and dark: the system's, until the reviewer chooses.

const currentTheme = () => document.documentElement.dataset.theme ?? null;
function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("review-theme", theme);
  } catch {
    // Private windows may keep nothing.
  }
}

try {
  const theme = localStorage.getItem("review-theme");
  if (theme) document.documentElement.dataset.theme = theme;
} catch {
  // As above.
}

async function start() {
  await poll();
  if (!state.status) return;
  if (state.status.runs) watchRuns(dialog);
  loadFields();
  await listFirst();
  $("list").focus();
}

document.addEventListener("saved", poll);
start();
