// The editor of the expected answer, open or closed.

import { $ } from "./dom.js";
import { state } from "./state.js";

export function openEditor(text) {
  state.editing = true;
  $("editor").hidden = false;
  if ($("edited").value !== text) $("edited").value = text;
}

const unified = (text) => text.replace(/\r\n?/g, "\n");

/** What is in the editor, lines ended as in the record, though browsers have every one end in "\n". */
export function editedText(record) {
  const text = $("edited").value;
  const before = [record.expected ?? "", record.source_expected ?? ""];
  const ends = new Set(before[0].match(/\r\n?|\n/g));
  return before.find((other) => unified(other) === text) ?? (ends.size === 1 ? text.replaceAll("\n", [...ends][0]) : text);
}

export function closeEditor() {
  state.editing = false;
  $("editor").hidden = true;
}
