// The editor of the expected answer, open or closed.

import { $ } from "./dom.js";
import { state } from "./state.js";

export function openEditor(text) {
  state.editing = true;
  $("editor").hidden = false;
  if ($("edited").value !== text) $("edited").value = text;
}

export function closeEditor() {
  state.editing = false;
  $("editor").hidden = true;
}
