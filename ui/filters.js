// Which rows are listed.

import { get } from "./api.js";
import { $, count, h } from "./dom.js";
import { relist } from "./rows.js";
import { state } from "./state.js";

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

export function drawShows() {
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

export async function loadFields() {
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

export function drawValues() {
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

export async function setFilter(field, value) {
  state.query.field = field;
  state.query.value = `=${value}`;
  await loadFields();
  await relist(null);
}
