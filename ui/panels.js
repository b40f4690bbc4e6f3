// What opens over the record: the numbers and the dialogs.

import { get, post } from "./api.js";
import { showScores } from "./dashboard.js";
import { $, count, h, notify } from "./dom.js";
import { loadFields, setFilter } from "./filters.js";
import { tokenView } from "./record.js";
import { list, pages } from "./rows.js";
import { state } from "./state.js";

const KEYS = [
  ["J or ↓, K or ↑", "next, previous row"],
  ["N, Shift+N", "next, previous error"],
  ["A", "accept: the expected answer is right; on to the next row"],
  ["S", "take the actual answer as the expected one; on to the next row"],
  ["E", "edit the expected answer; Ctrl+Enter saves, Esc leaves"],
  ["F", "flag: somebody is to look again"],
  ["U", "undo your last decision"],
  ["/", "search; Esc leaves, twice empties"],
  ["+, −, 0, W, 1", "zoom in, out, whole page, page width, own size"],
  ["R", "rotate the page"],
  ["[, ]", "previous, next page or image"],
  ["M", "compare by words or by characters"],
  ["V", "what the model sees: tokens and labels"],
  ["D", "numbers of the rows in the list"],
  ["?", "this help"],
];

export async function scores() {
  $("scores").replaceChildren(h("p", { class: "faint" }, "Counting …"));
  $("scores").setAttribute("aria-busy", "true");
  try {
    const by = $("slice-by").value;
    showScores(await get("scores", { view: list.view, by }), state.mistakes ?? {}, (field, value) => {
      setFilter(field, value);
      toggleScores(false);
    }, new Set(state.fields.map((field) => field.name)));
  } catch (error) {
    $("scores").replaceChildren(h("p", { class: "faint" }, error.message));
  }
  $("scores").removeAttribute("aria-busy");
}

export async function toggleScores(open = $("dashboard").hidden) {
  if (open && !state.status?.predicted) return;
  $("dashboard").hidden = !open;
  $("view").hidden = $("record").hidden = open;
  $("open-scores").setAttribute("aria-pressed", open ? "true" : "false");
  if (!open) return pages.place();
  await loadFields();
  await scores();
}

export function dialog(title, ...body) {
  $("dialog-title").textContent = title;
  $("dialog-body").replaceChildren(...body.flat());
  if (!$("dialog").open) $("dialog").showModal();
}

export const help = () =>
  dialog(
    "Keys",
    h("table", { class: "keys" }, KEYS.map(([keys, what]) => h("tr", {}, h("td", {}, h("kbd", {}, keys)), h("td", {}, what)))),
    h("p", { class: "faint" }, "Ctrl and wheel, or two fingers, zoom the page; dragging moves it; a double click zooms and fits."),
  );

export async function showTokens() {
  if (!state.record) return;
  try {
    notify("Loading the tokenizer …");
    dialog("What the model sees", tokenView(await get("token_view", { row: state.record.row })));
    notify("");
  } catch (error) {
    dialog("What the model sees", h("p", {}, error.message));
  }
}

export async function showBadLines() {
  const data = await get("bad_lines");
  dialog(
    `${count(data.count)} bad line${data.count === 1 ? "" : "s"}`,
    h("p", { class: "faint" }, "These lines are no records. They are not in the list, and the export leaves them out."),
    h(
      "table",
      { class: "grid" },
      data.lines.map(([line, reason]) => h("tr", {}, h("td", { class: "number" }, `line ${line}`), h("td", {}, reason))),
    ),
  );
}

export async function exportAll() {
  try {
    const done = await post("export", {});
    const left = done.left_out_count;
    dialog(
      "Exported",
      h("p", {}, `${count(done.count)} records: ${count(done.edited)} corrected, ${count(done.reviewed)} reviewed, ${count(done.flagged)} flagged.`),
      h("p", {}, h("code", { id: "exported" }, done.path)),
      h("p", {}, h("code", {}, `python -m train --dataset ${done.path} --images_dir ${state.status.images_dir}`)),
      left ? h("p", {}, `${count(left)} lines are left out, as train would refuse them:`) : "",
      left ? h("ul", {}, done.left_out.map((reason) => h("li", {}, `line ${reason}`))) : "",
    );
  } catch (error) {
    dialog("Not exported", h("p", {}, error.message));
  }
}


document.addEventListener("listed", () => {
  if (!$("dashboard").hidden) scores();
});
