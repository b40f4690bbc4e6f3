// The page's conductor: which rows are listed, which one is shown, and what the reviewer decides.

import { get, post } from "./api.js";
import { showScores } from "./dashboard.js";
import { $, count, h, notify, percent } from "./dom.js";
import { RowList, countRows } from "./list.js";
import { Pages } from "./pages.js";
import { showRecord, tokenView } from "./record.js";
import { watchRuns } from "./runs.js";

const SHOWS = {
  all: "All",
  errors: "Errors",
  correct: "Correct",
  unreviewed: "To review",
  reviewed: "Reviewed",
  edited: "Edited",
  flagged: "Flagged",
  failed: "Has error",
  fixed: "Fixed",
  broken: "Broken",
};
const NEED_ANSWERS = new Set(["errors", "correct", "failed"]);
const NEED_OTHER = new Set(["fixed", "broken"]);
const POLL = 1500; // milliseconds

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

const state = {
  query: { text: "", show: "all", field: "", value: "", sort: "file" },
  status: null,
  place: -1,
  record: null,
  by: "words",
  editing: false,
  busy: false, // a decision is on its way
  moving: 0, // another row is on its way: a key pressed now is not meant for the one that is still shown
  undo: [], // what your decisions replaced: {row, generation, name, before, version}
  drafts: new Map(), // unsaved texts by the rows' keys
};
let ticket = 0; // of the newest request for a row
let moves = 0; // how often another row was chosen

const list = new RowList((place) => go(place));
const pages = new Pages();

// Lists.

function parameters() {
  const { text, show, field, value, sort } = state.query;
  const found = [["text", text], ["show", show], ["sort", sort.replace("-", "")], ["count", "100"]];
  if (sort.endsWith("-")) found.push(["descending", "1"]);
  if (field && value !== "") found.push(["field", field], ["value", value.slice(1)]);
  return found;
}

let listing = 0;

/** Ask for the list again; a row stays the shown one if it is in it, else the first one is shown. */
async function relist(row = state.record?.row ?? null) {
  const mine = ++listing;
  let data;
  try {
    data = await get("view", parameters());
  } catch (error) {
    return notify(error.message, "bad");
  }
  if (mine !== listing) return;
  state.listed = { rows: state.status?.rows, generation: data.generation };
  $("newer").hidden = true;
  $("total").textContent = countRows(data.total);
  list.show(data.view, data.total, data.first);
  let place = null;
  const before = moves;
  if (row !== null) place = (await get("place", { view: data.view, row })).place;
  if (mine !== listing || before !== moves) return; // the reviewer has gone on in the meantime
  if (place !== null) {
    state.place = place;
    list.select(place);
    if (state.record?.row !== row) await open(row);
  } else if (data.total) {
    await go(0);
  } else {
    state.place = -1;
    list.select(-1);
    nothing();
  }
  if (!$("dashboard").hidden) scores();
}

/** Run something that asks for a place in the list; make the list again if the server no longer keeps it. */
async function withView(work) {
  try {
    return await work();
  } catch (error) {
    if (error.status === 410) await relist();
    else notify(error.message, "bad");
    return null;
  }
}

function nothing() {
  state.record = null;
  const empty = !state.status?.rows;
  $("record-name").textContent = empty ? "No rows yet" : "No rows here";
  $("record-line").textContent = "";
  $("badges").replaceChildren();
  $("record-body").replaceChildren(
    h("p", { class: "faint" }, empty ? "The file holds no record so far." : "No row fits the search and the filters."),
  );
  pages.clear("");
  closeEditor();
  enable();
}

// The shown row.

async function go(place) {
  if (place < 0 || place >= list.total) return;
  moves++;
  state.place = place;
  list.select(place);
  state.moving++;
  try {
    const row = await withView(() => list.at(place));
    if (row && state.place === place) await open(row.row);
  } finally {
    state.moving--;
  }
}

async function open(row) {
  const mine = ++ticket;
  let record;
  try {
    record = await get("row", { row });
  } catch (error) {
    return notify(error.message, "bad");
  }
  if (mine !== ticket) return;
  const before = state.record;
  show(record);
  if (before?.row !== record.row || before?.generation !== record.generation) {
    $("record-body").scrollTop = 0;
    if (record.images.length) pages.show(record.row, record.generation);
    else pages.clear("This record has no image.");
    const link = record.id === null ? `line=${record.line}` : `id=${encodeURIComponent(record.id)}`;
    history.replaceState(null, "", `#${link}`);
    document.title = `${record.id ?? `line ${record.line}`} – ${state.status?.file ?? "Review"}`;
    ahead();
  }
}

/** Fetch the next row's first page while this one is looked at. */
async function ahead() {
  const place = state.place + 1;
  const next = await list.at(place).catch(() => null);
  if (!next?.images || state.place + 1 !== place) return;
  new Image().src = `/api/image?${new URLSearchParams({ row: next.row, image: 0, page: 0, generation: state.record.generation })}`;
}

function show(record) {
  state.record = record;
  showRecord(record, state.by);
  const draft = state.drafts.get(record.key);
  if (draft === undefined) closeEditor();
  else openEditor(draft);
  enable();
}

function enable() {
  const record = state.record;
  const predicted = Boolean(state.status?.predicted);
  $("accept").disabled = !record || record.expected === null;
  $("take").disabled = !record?.acceptable || record.actual === record.expected;
  $("take").hidden = !predicted;
  $("edit").disabled = !record?.editable;
  $("edit").title = record && !record.editable ? "Too long, or no text: correct it in the file" : "Correct the expected answer (E)";
  $("flag").disabled = !record;
  $("flag").setAttribute("aria-pressed", record?.review.flagged ? "true" : "false");
  $("undo").disabled = !state.undo.length;
  $("by").textContent = state.by === "words" ? "by words" : "by characters";
  $("by").hidden = !predicted;
}

async function step(backwards, what) {
  const from = backwards ? Math.max(0, state.place) : state.place + 1;
  const query = { view: list.view, from, what };
  if (backwards) query.backwards = "1";
  const data = await withView(() => get("step", query));
  if (!data) return;
  if (data.place === null) notify(backwards ? "No error before this row." : "No error after this row.");
  else await go(data.place);
}

/** Show the row that the address names: #id=… or #line=…. */
async function openLink() {
  const link = new URLSearchParams(location.hash.slice(1));
  const query = link.has("id") ? { id: link.get("id") } : link.has("line") ? { line: link.get("line") } : null;
  if (!query) return false;
  const { row } = await get("find", query);
  if (row === null) {
    notify(`There is no row with ${Object.keys(query)[0]} ${Object.values(query)[0]}.`, "bad");
    return false;
  }
  const { place } = await get("place", { view: list.view, row });
  state.place = place ?? -1;
  list.select(state.place);
  await open(row);
  return true;
}

// Decisions. Each is on the server's disk before it is shown as made.

/** Save a decision about the shown row; true if it is saved. */
async function decide(change, note) {
  const record = state.record;
  if (!record || state.busy || state.moving) return false;
  const before = record.review;
  const saved = await save(record.row, record.generation, { ...before, ...change });
  if (!saved) return false;
  state.undo.push({ row: record.row, generation: record.generation, name: $("record-name").textContent, before, version: saved.row.review.version });
  notify(note);
  enable();
  return true;
}

async function save(row, generation, review) {
  state.busy = true;
  try {
    const data = await post("review", { row, generation, ...review });
    list.update(data.summary);
    if (data.revision === state.status.revision + 1) state.status.revision = data.revision; // our own: no news
    if (state.record?.row === row) show(data.row);
    poll();
    return data;
  } catch (error) {
    if (error.status === 409 && error.data.row) {
      // Somebody else was quicker: show theirs; a text that was typed stays in the editor.
      if (state.record?.row === row) show(error.data.row);
      state.undo = state.undo.filter((other) => other.row !== row);
      list.refresh();
    }
    notify(`Not saved: ${error.message}`, "bad");
    return null;
  } finally {
    state.busy = false;
  }
}

async function accept() {
  if ($("accept").disabled) return;
  if (await decide({ reviewed: true }, "Accepted.")) await go(state.place + 1);
}

async function take() {
  if ($("take").disabled || $("take").hidden) return;
  if (await decide({ reviewed: true, expected: state.record.actual }, "The actual answer is the expected one now.")) {
    await go(state.place + 1);
  }
}

async function flag() {
  if (!state.record || state.moving) return;
  const flagged = !state.record.review.flagged;
  await decide({ flagged }, flagged ? "Flagged." : "No longer flagged.");
}

async function undo() {
  const last = state.undo.at(-1);
  if (!last || state.busy) return;
  if (last.generation !== state.status?.generation) {
    state.undo = [];
    enable();
    return notify("The file was replaced; what was decided before is kept.", "bad");
  }
  const saved = await save(last.row, last.generation, { ...last.before, version: last.version });
  if (saved) {
    state.undo.pop();
    // Earlier decisions about the same row are now older than what the log holds.
    for (const other of state.undo) if (other.row === last.row) other.version = saved.row.review.version;
    notify(`Undone: ${last.name}`);
    const { place } = (await withView(() => get("place", { view: list.view, row: last.row }))) ?? {};
    state.place = place ?? state.place;
    list.select(state.place);
    await open(last.row);
  }
  enable();
}

function openEditor(text) {
  state.editing = true;
  $("editor").hidden = false;
  if ($("edited").value !== text) $("edited").value = text;
}

function closeEditor() {
  state.editing = false;
  $("editor").hidden = true;
}

function edit() {
  if (!state.record?.editable || state.moving) return;
  openEditor(state.record.expected ?? "");
  $("edited").focus();
}

function cancel() {
  if (state.record) state.drafts.delete(state.record.key);
  closeEditor();
  $("list").focus();
}

async function saveEdit() {
  // The list is being made again, and the record with it; the text stays in the editor.
  if (!state.record) return notify("The list is being made again; save once more.");
  const { key } = state.record;
  const text = $("edited").value;
  state.drafts.delete(key);
  if (await decide({ reviewed: true, expected: text }, "Saved.")) {
    closeEditor();
    $("list").focus();
  } else {
    // Not on the disk: the text stays in the editor.
    state.drafts.set(key, text);
    if (state.record?.key === key) openEditor(text);
  }
}

// The numbers, dialogs, export.

async function scores() {
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

async function toggleScores(open = $("dashboard").hidden) {
  if (open && !state.status?.predicted) return;
  $("dashboard").hidden = !open;
  $("view").hidden = $("record").hidden = open;
  $("open-scores").setAttribute("aria-pressed", open ? "true" : "false");
  if (!open) return pages.place();
  await loadFields();
  await scores();
}

function dialog(title, ...body) {
  $("dialog-title").textContent = title;
  $("dialog-body").replaceChildren(...body.flat());
  if (!$("dialog").open) $("dialog").showModal();
}

const help = () =>
  dialog(
    "Keys",
    h("table", { class: "keys" }, KEYS.map(([keys, what]) => h("tr", {}, h("td", {}, h("kbd", {}, keys)), h("td", {}, what)))),
    h("p", { class: "faint" }, "Ctrl and wheel, or two fingers, zoom the page; dragging moves it; a double click zooms and fits."),
  );

async function showTokens() {
  if (!state.record) return;
  try {
    notify("Loading the tokenizer …");
    dialog("What the model sees", tokenView(await get("token_view", { row: state.record.row })));
    notify("");
  } catch (error) {
    dialog("What the model sees", h("p", {}, error.message));
  }
}

async function showBadLines() {
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

async function exportAll() {
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

// Filters.

function drawShows() {
  const status = state.status;
  const shows = Object.entries(SHOWS).filter(
    ([name]) => (status.predicted || !NEED_ANSWERS.has(name)) && (status.other || !NEED_OTHER.has(name)),
  );
  $("shows").replaceChildren(
    ...shows.map(([name, title]) =>
      h(
        "button",
        {
          role: "radio",
          "data-show": name,
          "aria-checked": state.query.show === name ? "true" : "false",
          onclick: () => {
            state.query.show = name;
            drawShows();
            relist();
          },
        },
        title,
      ),
    ),
  );
}

async function loadFields() {
  const data = await get("fields");
  state.fields = data.fields;
  state.mistakes = data.mistakes;
  const options = data.fields.filter((field) => !field.too_many && field.values.length);
  const title = (field) => field.title + (field.too_many ? " (too many values)" : "");
  $("field").replaceChildren(
    h("option", { value: "" }, "any field"),
    ...options.map((field) => h("option", { value: field.name }, title(field))),
  );
  $("field").value = state.query.field;
  const by = $("slice-by").value;
  $("slice-by").replaceChildren(
    h("option", { value: "" }, "–"),
    ...options.filter((field) => field.name !== "mistake").map((field) => h("option", { value: field.name }, title(field))),
    h("option", { value: "page_size" }, "page size"),
  );
  $("slice-by").value = by;
  drawValues();
}

function drawValues() {
  const field = state.fields?.find((other) => other.name === state.query.field);
  $("value").hidden = !field;
  if (!field) return;
  // A value of "" is a value: options carry it behind a sign.
  $("value").replaceChildren(
    h("option", { value: "" }, "any value"),
    ...field.values.map(([value, rows]) => h("option", { value: `=${value}` }, `${value || "(empty)"} · ${count(rows)}`)),
  );
  $("value").value = state.query.value;
}

async function setFilter(field, value) {
  state.query.field = field;
  state.query.value = `=${value}`;
  await loadFields();
  await relist(null);
}

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
  const data = await get("view", parameters());
  state.listed = { rows: state.status.rows, generation: data.generation };
  $("total").textContent = countRows(data.total);
  list.show(data.view, data.total, data.first);
  if (!(await openLink())) {
    if (data.total) await go(0);
    else nothing();
  }
  $("list").focus();
}

start();
