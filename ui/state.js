// What the page knows at the moment; every part of it reads and changes this.

export const state = {
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
