// The numbers of `score` for the rows of the list.

import { $, count, h, percent } from "./dom.js";

const RATES = [
  ["normalised_accuracy", "normalised accuracy", "capitals, runs of spaces, Unicode forms do not count"],
  ["cer", "character error rate", "edits per expected character, 0 is best"],
  ["wer", "word error rate", "edits per expected word, 0 is best"],
  ["anls", "ANLS", "edit similarity as in DocVQA, 1 is best"],
  ["token_f1", "token F1", "shared words as in SQuAD, 1 is best"],
];
const LISTED = 25;

const number = (value) => (value === null || value === undefined ? "–" : value.toFixed(4));

function table(title, heads, rows, note = "") {
  if (!rows.length) return null;
  return h(
    "section",
    { class: "card" },
    h("h3", {}, title),
    h(
      "table",
      { class: "grid" },
      h("thead", {}, h("tr", {}, heads.map((name, k) => h("th", { scope: "col", class: k ? "number" : "" }, name)))),
      h("tbody", {}, rows.map((cells) => h("tr", {}, cells.map((cell, k) => h("td", { class: k ? "number" : "" }, cell))))),
    ),
    note && h("p", { class: "faint" }, note),
  );
}

/** A share as a bar with its number. */
const bar = (share) =>
  h("span", { class: "bar" }, h("meter", { min: 0, max: 1, value: share, "aria-hidden": "true" }), percent(share));

/**
 * Fill the dashboard.
 *
 * scores: as the server's /api/scores; mistakes: what each kind means; filter(field, value) narrows the list;
 * fields: the names it knows.
 */
export function showScores(scores, mistakes, filter, fields) {
  const parts = [
    h(
      "section",
      { class: "card hero" },
      h("h3", {}, "Accuracy"),
      h("div", { class: "big" }, percent(scores.accuracy, 2)),
      h(
        "p",
        {},
        `${count(scores.hits)} of ${count(scores.count)} right`,
        h("br"),
        `95 % interval ${percent(scores.accuracy_low)} to ${percent(scores.accuracy_high)}`,
      ),
      scores.corrected
        ? h("p", { class: "faint" }, `With ${count(scores.corrected)} corrected expected answers.`)
        : null,
      scores.rows.without_expected
        ? h("p", { class: "faint" }, `${count(scores.rows.without_expected)} rows without an expected answer left out.`)
        : null,
    ),
    table("How far off", ["", ""], RATES.map(([key, name, what]) => [h("span", { title: what }, name), number(scores[key])])),
    table(
      "Kinds of mistakes",
      ["", "rows"],
      Object.entries(scores.wrong.kinds).map(([kind, rows]) => [
        h("button", { class: "link", title: "show these rows", onclick: () => filter("mistake", kind) }, mistakes[kind] ?? kind),
        count(rows),
      ]),
    ),
  ];
  if (scores.comparison) {
    const other = scores.comparison;
    parts.push(
      other.error
        ? h("section", { class: "card" }, h("h3", {}, "Against the other file"), h("p", {}, other.error))
        : table(
            `Against the other file: ${other.verdict}`,
            ["", ""],
            [
              ["rows in both", count(other.count)],
              ["right there", count(other.before)],
              ["right here", count(other.after)],
              ["fixed", count(other.fixed)],
              ["broken", count(other.broken)],
              ["McNemar p", other.p_value.toPrecision(4)],
              ...Object.entries(other.differences).map(([name, change]) => [
                name,
                `${change.difference >= 0 ? "+" : ""}${change.difference.toFixed(3)} (${change.low.toFixed(3)} to ${change.high.toFixed(3)}) ${change.verdict}`,
              ]),
            ],
          ),
    );
  }
  if (scores.confidence) {
    parts.push(
      table(
        "Confidence, the least sure first",
        ["answers", "confidence", "right"],
        scores.confidence.bins.map((bin) => [count(bin.count), bar(bin.confidence), bar(bin.accuracy)]),
        `Expected calibration error ${number(scores.confidence.expected_calibration_error)}`,
      ),
    );
  }
  if (scores.slices) {
    parts.push(
      table(
        `By ${scores.by}, worst first`,
        ["", "rows", "right", "CER"],
        // Objects have keys that look like numbers first.
        Object.entries(scores.slices)
          .sort(([, a], [, b]) => a.accuracy - b.accuracy || b.count - a.count)
          .slice(0, LISTED)
          .map(([value, part]) => [
            fields.has(scores.by)
              ? h("button", { class: "link", title: "show these rows", onclick: () => filter(scores.by, value) }, value || "(empty)")
              : value,
            count(part.count),
            bar(part.accuracy),
            number(part.cer),
          ]),
        Object.keys(scores.slices).length > LISTED ? `${count(Object.keys(scores.slices).length - LISTED)} more` : "",
      ),
    );
  }
  if (scores.json) {
    const paths = Object.entries(scores.json.fields).sort((a, b) => a[1].accuracy - b[1].accuracy);
    parts.push(
      table("JSON answers", ["", ""], [
        ["answers that are JSON", percent(scores.json.valid)],
        ["fields, precision", number(scores.json.precision)],
        ["fields, recall", number(scores.json.recall)],
        ["fields, F1", number(scores.json.f1)],
      ]),
      table(
        "JSON fields, worst first",
        ["", "rows", "right"],
        paths.slice(0, LISTED).map(([path, share]) => [path, count(share.count), bar(share.accuracy)]),
      ),
    );
  }
  for (const what of ["characters", "words"]) {
    const { replaced, missing, extra } = scores.wrong[what];
    const rows = [
      ...replaced.map((row) => [row.expected, row.answered, row.count]),
      ...missing.map((row) => [row.expected, "missing", row.count]),
      ...extra.map((row) => ["extra", row.answered, row.count]),
    ].sort((a, b) => b[2] - a[2]);
    parts.push(
      table(
        `Commonest wrong ${what}`,
        ["expected", "answered", "times"],
        rows.slice(0, 12).map(([expected, answered, times]) => [h("code", {}, expected), h("code", {}, answered), count(times)]),
      ),
    );
  }
  $("scores").replaceChildren(...parts.filter(Boolean));
}
