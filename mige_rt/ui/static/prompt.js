// Shows each <imagehere> of a prompt as a chip with the image that it stands for. The textarea, which is what Gradio
// reads and writes, keeps the text and is hidden.
(() => {
  const PLACEHOLDER = "<imagehere>";
  const PATTERN = /<imagehere>/i;
  const nativeValue = Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, "value");
  const editors = new Set();

  class PromptEditor {
    constructor(field, textarea) {
      this.field = field;
      this.textarea = textarea;
      this.task = field.id.replace("-prompt", "");
      this.box = document.createElement("div");
      Object.assign(this.box, {className: "mige-editor", contentEditable: "true", spellcheck: true});
      this.box.setAttribute("role", "textbox");
      this.box.setAttribute("aria-multiline", "true");
      this.box.setAttribute("aria-label", "Prompt");
      this.box.dataset.placeholder = textarea.placeholder;
      this.insertButton = document.createElement("button");
      Object.assign(this.insertButton, {type: "button", className: "mige-insert", textContent: "+ Image"});
      this.insertButton.title = `Insert ${PLACEHOLDER} where the cursor is`;
      this.range = null; // where the cursor was last
      textarea.after(this.box, this.insertButton);
      field.classList.add("mige-rich");
      this.connect();
      this.show(nativeValue.get.call(textarea));
    }

    connect() {
      const {box, textarea} = this;
      // Gradio sets the value when it restores settings or loads an example.
      Object.defineProperty(textarea, "value", {
        configurable: true,
        get: () => nativeValue.get.call(textarea),
        set: (text) => {
          nativeValue.set.call(textarea, text);
          if (text !== this.text()) this.show(text ?? "");
        },
      });
      box.addEventListener("input", () => this.changed());
      box.addEventListener("paste", (event) => {
        event.preventDefault();
        document.execCommand("insertText", false, event.clipboardData.getData("text/plain"));
      });
      box.addEventListener("drop", (event) => event.dataTransfer.files.length && event.preventDefault());
      box.addEventListener("keydown", (event) => {
        if (event.key !== "Enter") return;
        event.preventDefault();
        if (event.ctrlKey || event.metaKey) document.querySelector(`#${this.task}-run`)?.click();
        else document.execCommand("insertLineBreak");
      });
      document.addEventListener("selectionchange", () => {
        const selection = document.getSelection();
        if (selection.rangeCount && box.contains(selection.anchorNode)) this.range = selection.getRangeAt(0).cloneRange();
      });
      this.insertButton.addEventListener("pointerdown", (event) => event.preventDefault()); // keeps the focus
      this.insertButton.addEventListener("click", () => this.insertChip());
    }

    text() {
      const parts = [...this.box.childNodes].map((node) => {
        if (node.nodeName === "BR") return node === this.box.lastChild ? "" : "\n";
        return node.dataset?.chip ? PLACEHOLDER : node.textContent.replaceAll("\u00a0", " ");
      });
      return parts.join("");
    }

    show(text) {
      const parts = text.split(new RegExp(PATTERN, "gi"));
      const nodes = parts.flatMap((part, i) => (i ? [newChip(), part] : [part]));
      this.box.replaceChildren(...nodes.filter((node) => node !== ""));
      this.range = null;
      this.refresh();
    }

    changed() {
      for (const node of [...this.box.childNodes]) if (node.nodeType === Node.TEXT_NODE) this.replaceTyped(node);
      nativeValue.set.call(this.textarea, this.text());
      this.textarea.dispatchEvent(new Event("input", {bubbles: true}));
      this.refresh();
    }

    replaceTyped(node) {
      for (let match; (match = PATTERN.exec(node.data)); ) {
        const typed = node.splitText(match.index);
        node = typed.splitText(PLACEHOLDER.length);
        const chip = newChip();
        typed.replaceWith(chip);
        placeCursorAfter(chip);
      }
    }

    insertChip() {
      const range = this.range ?? document.createRange();
      if (!this.range) range.selectNodeContents(this.box), range.collapse(false);
      range.deleteContents();
      const before = document.createRange();
      before.setStart(this.box, 0);
      before.setEnd(range.startContainer, range.startOffset);
      const after = document.createRange();
      after.setStart(range.endContainer, range.endOffset);
      after.setEnd(this.box, this.box.childNodes.length);
      const holds = (part) => part.toString() !== "" || part.cloneContents().querySelector("[data-chip]");
      const chip = newChip();
      if (!/^\s/.test(after.toString())) range.insertNode(document.createTextNode("\u00a0"));
      range.insertNode(chip);
      if (holds(before) && !/\s$/.test(before.toString())) chip.before("\u00a0");
      this.box.normalize();
      this.box.focus();
      document.getSelection().collapse(chip.nextSibling, 1); // behind the space
      this.changed();
    }

    refresh() {
      const images = this.images();
      const chips = [...this.box.querySelectorAll("[data-chip]")];
      const hasSource = document.querySelector(`#${this.task}-source img`) !== null;
      const first = hasSource && chips.length < images.length ? images.length - chips.length : 0;
      chips.forEach((chip, i) => {
        const index = this.task === "edit" ? 0 : i + (this.task === "compose" ? Math.min(first, 1) : 0);
        label(chip, `image ${index + 1}`, images[index] ?? "");
      });
      this.box.classList.toggle("mige-empty", this.text() === "");
    }

    images() {
      const all = document.querySelectorAll(`#${this.task}-source img, #${this.task}-references img`);
      return [...all].map((image) => image.src);
    }
  }

  function newChip() {
    const chip = document.createElement("span");
    chip.className = "mige-chip";
    chip.contentEditable = "false";
    chip.dataset.chip = "1";
    return chip;
  }

  function label(chip, name, source) {
    if (chip.dataset.name === name && chip.dataset.source === source) return;
    Object.assign(chip.dataset, {name, source});
    const thumbnail = document.createElement("img");
    Object.assign(thumbnail, {src: source, alt: ""});
    chip.replaceChildren(...(source ? [thumbnail] : []), name);
    chip.classList.toggle("mige-missing", !source);
  }

  function placeCursorAfter(node) {
    const range = document.createRange();
    range.setStartAfter(node);
    range.collapse(true);
    const selection = document.getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
  }

  function update() {
    for (const textarea of document.querySelectorAll(".mige-prompt textarea:not([data-mige])")) {
      textarea.dataset.mige = "1";
      editors.add(new PromptEditor(textarea.closest(".mige-prompt"), textarea));
    }
    for (const editor of editors) editor.box.isConnected ? editor.refresh() : editors.delete(editor);
  }

  let isDue = false;
  new MutationObserver(() => {
    if (!isDue) requestAnimationFrame(() => ((isDue = false), update()));
    isDue = true;
  }).observe(document.documentElement, {childList: true, subtree: true, attributes: true, attributeFilter: ["src"]});
})();
