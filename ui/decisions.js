// Decisions. Each is on the server's disk before it is shown as made.

import { get, post } from "./api.js";
import { $, notify } from "./dom.js";
import { closeEditor, editedText, openEditor } from "./editor.js";
import { enable, go, list, open, show, withView } from "./rows.js";
import { state } from "./state.js";

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
    document.dispatchEvent(new Event("saved"));
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

export async function accept() {
  if ($("accept").disabled) return;
  if (await decide({ reviewed: true }, "Accepted.")) await go(state.place + 1);
}

export async function take() {
  if ($("take").disabled || $("take").hidden) return;
  if (await decide({ reviewed: true, expected: state.record.actual }, "The actual answer is the expected one now.")) {
    await go(state.place + 1);
  }
}

export async function flag() {
  if (!state.record || state.moving) return;
  const flagged = !state.record.review.flagged;
  await decide({ flagged }, flagged ? "Flagged." : "No longer flagged.");
}

export async function undo() {
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

export function edit() {
  if (!state.record?.editable || state.moving) return;
  openEditor(state.record.expected ?? "");
  $("edited").focus();
}

export function cancel() {
  if (state.record) state.drafts.delete(state.record.key);
  closeEditor();
  $("list").focus();
}

export async function saveEdit() {
  // The list is being made again, and the record with it; the text stays in the editor.
  if (!state.record) return notify("The list is being made again; save once more.");
  const { key } = state.record;
  const text = editedText(state.record);
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
