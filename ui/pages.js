// The page's image: zoom, pan and rotate; several images, and the pages of PDFs and TIFFs, as tabs.

import { get } from "./api.js";
import { $, h } from "./dom.js";

const MOST = 16; // times its own size

export class Pages {
  constructor() {
    this.stage = $("stage");
    this.image = $("page");
    this.tabs = $("tabs");
    this.note = $("page-note");
    this.size = $("page-size");
    this.pages = [];
    this.number = 0;
    this.mode = "page"; // fit the whole page, its "width", or "free"
    this.scale = 1;
    this.x = this.y = 0; // of the page's centre from the stage's, in pixels
    this.turns = 0;
    this.kept = new Map(); // quarter turns by image
    this.loading = 0;
    this.pointers = new Map();
    this.listen();
  }

  /** Show the images of a row. */
  async show(row, generation) {
    const ticket = ++this.loading;
    this.row = row;
    this.generation = generation;
    let images = [];
    try {
      images = (await get("images", { row })).images;
    } catch (error) {
      images = [{ name: "", error: error.message }];
    }
    if (ticket !== this.loading) return;
    this.pages = images.flatMap((image, number) =>
      image.error
        ? [{ ...image, number, title: image.name }]
        : image.pages.map((size, page) => ({
            number,
            page,
            size,
            name: image.name,
            title: image.pages.length > 1 ? `${image.name} – ${page + 1}` : image.name,
          })),
    );
    this.open(0);
  }

  /** Nothing to show. */
  clear(text) {
    this.loading++;
    this.pages = [];
    this.tabs.replaceChildren();
    this.placeholder(text);
  }

  open(number) {
    this.number = Math.max(0, Math.min(number, this.pages.length - 1));
    const page = this.pages[this.number];
    this.tabs.hidden = this.pages.length < 2;
    this.tabs.replaceChildren(
      ...this.pages.map((other, k) =>
        h(
          "button",
          {
            role: "tab",
            class: other.error ? "tab bad" : "tab",
            "aria-selected": k === this.number ? "true" : "false",
            title: other.title,
            onclick: () => this.open(k),
          },
          other.title.split("/").pop() || "?",
        ),
      ),
    );
    this.tabs.children[this.number]?.scrollIntoView({ block: "nearest", inline: "nearest" });
    if (!page) return this.placeholder("This record has no image.");
    if (page.error) return this.placeholder(page.error, page.name);
    this.turns = this.kept.get(this.key(page)) ?? 0;
    this.note.hidden = true;
    this.size.textContent = `${page.size[0]} × ${page.size[1]} px`;
    const image = this.image;
    image.alt = `Page ${this.number + 1} of ${this.pages.length}: ${page.title}`;
    image.classList.add("loading");
    image.onload = () => {
      image.hidden = false;
      image.classList.remove("loading");
      this.place();
    };
    image.onerror = () => this.explain(image.src, page.name);
    image.src = this.url(page);
  }

  key(page) {
    return `${this.generation} ${this.row} ${page.number} ${page.page}`;
  }

  url(page) {
    const parameters = { row: this.row, image: page.number, page: page.page, generation: this.generation };
    return `/api/image?${new URLSearchParams(parameters)}`;
  }

  placeholder(text, name = "") {
    this.image.hidden = true;
    this.image.removeAttribute("src");
    this.size.textContent = "";
    this.note.hidden = false;
    this.note.replaceChildren(name ? h("strong", {}, name) : "", h("span", {}, text));
  }

  async explain(url, name) {
    if (!this.image.getAttribute("src")) return;
    let reason = "the page cannot be shown";
    try {
      const response = await fetch(url);
      if (!response.ok) reason = (await response.json()).error;
    } catch {
      reason = "the server does not answer";
    }
    if (this.image.src === url) this.placeholder(reason, name);
  }

  // Geometry. The page's centre lies (x, y) from the stage's.

  natural() {
    const { naturalWidth: width, naturalHeight: height } = this.image;
    return this.turns % 2 ? [height, width] : [width, height];
  }

  place() {
    const [width, height] = this.natural();
    const room = this.stage.getBoundingClientRect();
    if (!width || !room.width) return;
    const fitWidth = (room.width - 24) / width;
    const fitPage = Math.min(fitWidth, (room.height - 24) / height);
    if (this.mode === "page") {
      this.scale = fitPage;
      this.x = this.y = 0;
    } else if (this.mode === "width") {
      this.scale = fitWidth;
      this.x = 0;
      this.y = Math.max(0, (height * this.scale - room.height + 24) / 2);
    }
    this.scale = Math.min(Math.max(this.scale, fitPage / 2), MOST);
    // Some of the page always stays in sight.
    const limit = (length, view) => Math.max(0, (length * this.scale - view) / 2 + view * 0.4);
    const [mostX, mostY] = [limit(width, room.width), limit(height, room.height)];
    if (this.mode === "free") {
      this.x = Math.min(Math.max(this.x, -mostX), mostX);
      this.y = Math.min(Math.max(this.y, -mostY), mostY);
    }
    const x = room.width / 2 + this.x;
    const y = room.height / 2 + this.y;
    this.image.style.transform =
      `translate(${x}px, ${y}px) rotate(${this.turns * 90}deg) scale(${this.scale}) translate(-50%, -50%)`;
    $("zoom").textContent = `${Math.round(this.scale * 100)} %`;
    this.stage.dataset.mode = this.mode;
  }

  /** Zoom by a factor around a point of the window, or the stage's centre. */
  zoom(factor, point = null) {
    const room = this.stage.getBoundingClientRect();
    const px = point ? point.x - room.left - room.width / 2 : 0;
    const py = point ? point.y - room.top - room.height / 2 : 0;
    const scale = Math.min(Math.max(this.scale * factor, 0.01), MOST);
    const real = scale / this.scale;
    this.mode = "free";
    this.x = px + (this.x - px) * real;
    this.y = py + (this.y - py) * real;
    this.scale = scale;
    this.place();
  }

  fit(mode) {
    this.mode = mode;
    this.place();
  }

  actualSize() {
    this.zoom(1 / this.scale);
  }

  rotate() {
    this.turns = (this.turns + 1) % 4;
    const page = this.pages[this.number];
    if (page) this.kept.set(this.key(page), this.turns);
    this.place();
  }

  pan(dx, dy) {
    this.mode = "free";
    this.x += dx;
    this.y += dy;
    this.place();
  }

  listen() {
    const stage = this.stage;
    new ResizeObserver(() => this.place()).observe(stage);
    stage.addEventListener(
      "wheel",
      (event) => {
        event.preventDefault();
        const pixels = event.deltaMode === 1 ? 30 : 1; // lines or pixels
        if (event.ctrlKey || event.metaKey) this.zoom(Math.exp(-event.deltaY * pixels * 0.004), event);
        else this.pan(-event.deltaX * pixels, -event.deltaY * pixels);
      },
      { passive: false },
    );
    stage.addEventListener("dblclick", (event) => {
      if (this.mode === "free") this.fit("page");
      else this.zoom(Math.max(2, 1 / this.scale), event);
    });
    stage.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      this.pointers.set(event.pointerId, event);
      stage.setPointerCapture(event.pointerId);
    });
    stage.addEventListener("pointermove", (event) => {
      const before = this.pointers.get(event.pointerId);
      if (!before) return;
      const others = [...this.pointers.values()].filter((other) => other.pointerId !== event.pointerId);
      this.pointers.set(event.pointerId, event);
      if (others.length) {
        const distance = (a, b) => Math.hypot(a.x - b.x, a.y - b.y);
        this.zoom(distance(event, others[0]) / Math.max(1, distance(before, others[0])), event);
      } else {
        this.pan(event.x - before.x, event.y - before.y);
      }
    });
    for (const name of ["pointerup", "pointercancel"]) {
      stage.addEventListener(name, (event) => this.pointers.delete(event.pointerId));
    }
  }
}
