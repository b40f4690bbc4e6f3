// The list of rows, and the one that is shown.

import { get } from "./api.js";
import { $, h, notify } from "./dom.js";
import { closeEditor, openEditor } from "./editor.js";
import { RowList, countRows } from "./list.js";
import { Pages } from "./pages.js";
import { showRecord } from "./record.js";
import { state } from "./state.js";

export const list = new RowList((place) => go(place));
export const pages = new Pages();

let ticket = 0; // of the newest request for a row
let moves = 0; // how often another row was chosen

function parameters() {
  const { text, show, field, value, sort } = state.query;
  const found = [["text", text], ["show", show], ["sort", sort.replace("-", "")], ["count", "100"]];
  if (sort.endsWith("-")) found.push(["descending", "1"]);
  if (field && value !== "") found.push(["field", field], ["value", value.slice(1)]);
  return found;
}

let listing = 0;

/** Ask for the list again; a row stays the shown one if it is in it, else the first one is shown. Tells "listed". */
export async function relist(row = state.record?.row ?? null) {
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
  document.dispatchEvent(new Event("listed"));
}

/** Ask for the list for the first time, and show the row that the address names, or else the first one. */
export async function listFirst() {
  const data = await get("view", parameters());
  state.listed = { rows: state.status.rows, generation: data.generation };
  $("total").textContent = countRows(data.total);
  list.show(data.view, data.total, data.first);
  if (await openLink()) return;
  if (data.total) await go(0);
  else nothing();
}

/** Run something that asks for a place in the list; make the list again if the server no longer keeps it. */
export async function withView(work) {
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

export async function go(place) {
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

export async function open(row) {
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

export function show(record) {
  state.record = record;
  showRecord(record, state.by);
  const draft = state.drafts.get(record.key);
  if (draft === undefined) closeEditor();
  else openEditor(draft);
  enable();
}

export function enable() {
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

export async function step(backwards, what) {
  const from = backwards ? Math.max(0, state.place) : state.place + 1;
  const query = { view: list.view, from, what };
  if (backwards) query.backwards = "1";
  const data = await withView(() => get("step", query));
  if (!data) return;
  if (data.place === null) notify(backwards ? "No error before this row." : "No error after this row.");
  else await go(data.place);
}

/** Show the row that the address names: #id=… or #line=…. */
export async function openLink() {
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
