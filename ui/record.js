// One record: what was expected, what was answered, how they differ, and everything else that is known.

import { $, count, h, percent } from "./dom.js";

const METRICS = {
  exact: ["exact", "equal, white space around both aside"],
  normalised: ["normalised", "capitals, runs of spaces, Unicode forms do not count"],
  cer: ["CER", "edits per expected character, 0 is best"],
  wer: ["WER", "edits per expected word, 0 is best"],
  anls: ["ANLS", "edit similarity as in DocVQA, 1 is best"],
  token_f1: ["token F1", "shared words as in SQuAD, 1 is best"],
};

/** Text with signs for what is not seen. */
const signs = (text) => text.replaceAll(" ", "␣").replaceAll("\t", "⇥").replaceAll("\n", "⏎\n");

/** One side of a difference; `side` is 0 for the expected answer, 1 for the actual one. */
function pieces(diff, side) {
  return diff.map((pair) => {
    const text = pair[side];
    if (!text || pair[0] === pair[1]) return text;
    const blank = !text.trim();
    return h(
      side ? "ins" : "del",
      { title: side ? "not expected" : "missing in the answer" },
      blank ? signs(text) : text,
    );
  });
}

function answerBox(title, text, diff, side, extra = {}) {
  const body =
    text === null
      ? h("span", { class: "faint" }, extra.none ?? "none")
      : text === ""
        ? h("span", { class: "faint" }, "(empty)")
        : diff
          ? pieces(diff, side)
          : text;
  return h(
    "section",
    { class: `answer ${extra.class ?? ""}`, "aria-label": title },
    h("h3", {}, title, h("span", { class: "faint" }, extra.note ?? "")),
    h("div", { class: "text", tabindex: "0", "data-testid": extra.id ?? null }, body),
  );
}

/** What was thought before an answer, folded away; nothing if there is none. */
function thought(text) {
  return text && h("details", { class: "thinking" }, h("summary", {}, "Thinking"), h("div", { class: "text" }, text));
}

function badge(kind, text) {
  return h("span", { class: `badge ${kind}` }, text);
}

/** Fill the panel with a record. `by` is "words" or "characters". */
export function showRecord(record, by) {
  const diff = record.diff?.[by];
  const edited = record.review.expected !== null;
  $("record-name").textContent = record.id ?? `line ${record.line}`;
  $("record-line").textContent = record.id === null ? "" : `line ${record.line}`;
  $("badges").replaceChildren(
    ...[
      record.right === true && badge("right", "right"),
      record.right === false && badge("wrong", record.failed ? "error" : record.actual === null ? "no answer" : "wrong"),
      record.change && badge(record.change, record.change),
      edited && badge("edited", "corrected"),
      record.review.reviewed && badge("reviewed", "reviewed"),
      record.review.flagged && badge("flagged", "flagged"),
    ].filter(Boolean),
  );

  const sections = [];
  if (record.problem) {
    sections.push(h("p", { class: "problem", role: "note" }, "Train would refuse this record: ", record.problem));
  }
  if (record.error !== null) {
    sections.push(h("p", { class: "problem", role: "note" }, "Predict could not answer: ", record.error));
  }
  const sure = record.confidence?.min;
  const nearest = record.diff?.nearest ?? 0; // of several right answers the one that is compared
  const answers = [record.expected, ...record.others].map((text, k) =>
    answerBox(k ? "or" : edited ? "Expected (corrected)" : "Expected", text, k === nearest ? diff : null, 0, {
      id: k ? "or" : "expected",
      class: k ? "or" : "",
      note: !k && record.others.length ? " the first is learned" : "",
      none: "no expected answer",
    }),
  );
  const predicted = record.actual !== null || record.error !== null || record.right !== null;
  if (predicted) {
    answers.push(
      answerBox("Actual", record.actual, diff, 1, {
        id: "actual",
        none: "no answer",
        note: sure === null || sure === undefined ? "" : ` confidence ${percent(sure)}`,
      }),
    );
  }
  answers.push(thought(record.thinking));
  if (record.other) {
    const other = record.other;
    const note = other.right === null ? "" : other.right ? " right" : " wrong";
    answers.push(
      answerBox("Other file", other.actual, other.diff?.[by], 1, {
        id: "other",
        class: "other",
        none: other.error ?? "no answer",
        note: note + (other.expects_otherwise ? ", its expected answer differs" : ""),
      }),
      thought(other.thinking),
    );
  }
  if (edited) {
    answers.push(
      h("details", {}, h("summary", {}, "As in the file"), h("div", { class: "text" }, record.source_expected ?? "none")),
    );
  }
  sections.push(h("div", { class: "answers" }, answers));

  if (record.json_fields) sections.push(jsonFields(record.json_fields));
  if (Object.keys(record.metrics).length || record.confidence) sections.push(numbers(record));
  if (record.messages.length) {
    sections.push(
      h("details", { open: true }, h("summary", {}, "Messages"), record.messages.map(message)),
    );
  }
  if (record.fields.length) {
    sections.push(
      h(
        "details",
        { open: true },
        h("summary", {}, "Other fields"),
        h("dl", { class: "fields" }, record.fields.map(([name, text]) => [h("dt", {}, name), h("dd", {}, text ?? "null")])),
      ),
    );
  }
  $("record-body").replaceChildren(...sections);
}

function jsonFields(rows) {
  return h(
    "table",
    { class: "grid", "aria-label": "JSON fields" },
    h("thead", {}, h("tr", {}, ["field", "expected", "actual", "confidence"].map((name) => h("th", { scope: "col" }, name)))),
    h(
      "tbody",
      {},
      rows.map(([path, expected, actual, right, sure]) =>
        h(
          "tr",
          { class: right ? "" : "wrong" },
          h("th", { scope: "row" }, path || "(value)"),
          h("td", {}, expected ?? "–"),
          h("td", {}, right ? (actual ?? "–") : h("ins", {}, actual ?? "missing")),
          h("td", { class: "number" }, percent(sure, 0)),
        ),
      ),
    ),
  );
}

function numbers(record) {
  const found = Object.entries(record.metrics).map(([name, value]) => [
    ...METRICS[name],
    name === "exact" || name === "normalised" ? (value ? "yes" : "no") : value.toFixed(3),
  ]);
  const sure = record.confidence;
  if (sure) {
    const kinds = { min: "least sure token", mean: "tokens on average", sum: "whole answer" };
    for (const [kind, what] of Object.entries(kinds)) {
      found.push([`confidence, ${kind}`, `probability of the ${what}`, percent(sure[kind])]);
    }
    if (sure.tokens) found.push(["tokens", "of the answer", sure.tokens]);
  }
  return h(
    "dl",
    { class: "numbers" },
    found.map(([name, title, text]) => h("div", { title }, h("dt", {}, name), h("dd", {}, text))),
  );
}

function message(data) {
  return h(
    "div",
    { class: `message ${data.role}` },
    h("span", { class: "role" }, data.role),
    data.blocks.map(([kind, text]) => {
      if (kind === "image") return h("div", { class: "image-name" }, "▣ ", text);
      return kind === "thinking" ? thought(text) : h("div", { class: "text" }, text ?? "");
    }),
  );
}

/** What the model sees of a record, for a dialog. */
export function tokenView(data) {
  const names = { control: "control token", text: "token", image: "image" };
  return [
    h(
      "p",
      {},
      `${count(data.count)} tokens as ${data.model} gets them: ${count(data.image)} of images, ` +
        `${count(data.learned)} to learn (underlined, the others have no label).`,
    ),
    h(
      "div",
      { class: "tokens" },
      data.stretches.map((part) =>
        part.kind === "image"
          ? h(
              "span",
              { class: "token-image" },
              `▣ ${part.grid[1]} × ${part.grid[0]} tokens + ${part.grid[0]} row ends, page of ${part.size[0]} × ` +
                `${part.size[1]} px fed as ${part.fed[0]} × ${part.fed[1]} px`,
            )
          : part.texts.map((text, k) =>
              h(
                "span",
                {
                  class: `token ${part.kind}${part.learned ? " learned" : ""}`,
                  title: `${names[part.kind]} ${part.ids[k]}${part.learned ? ", to learn" : ""}`,
                },
                text.includes("\n") ? signs(text) : text,
              ),
            ),
      ),
    ),
    data.hidden ? h("p", { class: "faint" }, `${count(data.hidden)} more tokens`) : "",
  ];
}
