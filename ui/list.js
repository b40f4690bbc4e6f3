// The list of rows: only those in sight are elements, so a million are as quick as a hundred.

import { get } from "./api.js";
import { $, count, h, percent } from "./dom.js";

const HEIGHT = 54; // pixels of a row, as in style.css
const BLOCK = 100; // rows fetched at once
const TALLEST = 15_000_000; // pixels that every browser can scroll; longer lists scroll faster than the mouse

export class RowList {
  /** onSelect(place) is called when a row is chosen. */
  constructor(onSelect) {
    this.scroller = $("list");
    this.space = $("list-space");
    this.onSelect = onSelect;
    this.view = null;
    this.total = 0;
    this.place = -1;
    this.blocks = new Map(); // rows by block, or the promise of them
    this.stale = new Map(); // what is shown until they are fetched again
    this.scroller.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.draw()).observe(this.scroller);
  }

  /** Show another list; `first` are its first rows. */
  show(view, total, first) {
    this.view = view;
    this.total = total;
    this.blocks = new Map();
    this.stale = new Map();
    if (first.length >= Math.min(total, BLOCK)) this.blocks.set(0, first.slice(0, BLOCK));
    this.space.style.height = `${Math.min(total * HEIGHT, TALLEST)}px`;
    this.draw();
  }

  /** The row at a place, fetched if need be; null if there is none. */
  async at(place) {
    if (place < 0 || place >= this.total) return null;
    return (await this.block(Math.floor(place / BLOCK)))[place % BLOCK] ?? null;
  }

  /** Mark a place as the one that is shown, and scroll to it. */
  select(place) {
    this.place = place;
    const seen = this.scroller.clientHeight;
    const first = this.top();
    const last = first + Math.floor(seen / HEIGHT) - 1;
    if (place >= 0 && (place < first || place > last)) {
      this.scroller.scrollTop = this.offset(Math.max(0, place - Math.floor(seen / HEIGHT / 3)));
    }
    this.draw();
  }

  /** Replace what is known of a row. */
  update(summary) {
    for (const rows of this.blocks.values()) {
      if (!Array.isArray(rows)) continue;
      const place = rows.findIndex((row) => row.row === summary.row);
      if (place >= 0) rows[place] = summary;
    }
    this.draw();
  }

  /** Forget what is known of all rows, and fetch those in sight again. */
  refresh() {
    this.stale = this.blocks;
    this.blocks = new Map();
    this.draw();
  }

  // Scrolling: pixels per row are HEIGHT, or less where the list is taller than a browser allows.
  scale() {
    const room = this.total * HEIGHT - this.scroller.clientHeight;
    const real = Math.min(this.total * HEIGHT, TALLEST) - this.scroller.clientHeight;
    return room > 0 && real > 0 ? room / real : 1;
  }
  top() {
    return (this.scroller.scrollTop * this.scale()) / HEIGHT;
  }
  offset(place) {
    return (place * HEIGHT) / this.scale();
  }

  async block(number) {
    let rows = this.blocks.get(number);
    if (!rows) {
      const blocks = this.blocks;
      rows = get("rows", { view: this.view, start: number * BLOCK, count: BLOCK }).then((data) => data.rows);
      blocks.set(number, rows);
      rows.then(
        (found) => {
          blocks.set(number, found);
          if (blocks === this.blocks) this.draw();
        },
        () => blocks.delete(number),
      );
    }
    return rows;
  }

  draw() {
    const top = this.top();
    const seen = Math.ceil(this.scroller.clientHeight / HEIGHT);
    const first = Math.max(0, Math.floor(top) - 3);
    const last = Math.min(this.total, Math.floor(top) + seen + 4);
    const elements = [];
    for (let place = first; place < last; place++) {
      const number = Math.floor(place / BLOCK);
      let rows = this.blocks.get(number);
      if (!rows) this.block(number).catch(() => {});
      if (!Array.isArray(rows)) rows = this.stale.get(number);
      const element = this.element(place, Array.isArray(rows) ? rows[place % BLOCK] : null);
      element.style.top = `${this.scroller.scrollTop + (place - top) * HEIGHT}px`;
      elements.push(element);
    }
    this.space.replaceChildren(...elements);
    if (this.place >= first && this.place < last) {
      this.scroller.setAttribute("aria-activedescendant", `row-${this.place}`);
    } else {
      this.scroller.removeAttribute("aria-activedescendant");
    }
  }

  element(place, row) {
    const chosen = place === this.place;
    const attributes = {
      class: `row${chosen ? " chosen" : ""}`,
      id: `row-${place}`,
      role: "option",
      "aria-selected": chosen ? "true" : "false",
      "aria-posinset": place + 1,
      "aria-setsize": this.total,
      onclick: () => this.onSelect(place),
    };
    if (!row) return h("div", attributes, h("span", { class: "faint" }, "…"));
    const answer = row.error !== null ? row.error : row.right === false ? (row.actual ?? "no answer") : row.expected;
    return h(
      "div",
      attributes,
      h(
        "div",
        { class: "row-head" },
        mark(row),
        h("span", { class: "row-name" }, row.id ?? `line ${row.line}`),
        row.flagged && h("span", { class: "flag", title: "flagged" }, "⚑"),
        row.edited && h("span", { class: "edited", title: "corrected" }, "✎"),
        row.reviewed && h("span", { class: "reviewed", title: "reviewed" }, "✓"),
        row.confidence !== null && h("span", { class: "sure", title: "confidence" }, percent(row.confidence, 0)),
      ),
      h("div", { class: "row-text" }, answer === "" ? "(empty)" : (answer ?? row.actual ?? "")),
    );
  }
}

/** Right, wrong or neither, as a sign and a word. */
export function mark(row) {
  const word = row.change ?? (row.failed ? "error" : row.right === true ? "right" : row.right === false ? "wrong" : "");
  if (!word) return null;
  const sign = { right: "●", wrong: "○", error: "!", fixed: "▲", broken: "▼" }[word];
  return h("span", { class: `mark ${word}`, title: word, role: "img", "aria-label": word }, sign);
}

export const countRows = (total) => `${count(total)} row${total === 1 ? "" : "s"}`;
