// Elements. Text only ever becomes text nodes: nothing a model writes is parsed as HTML.

const $ = (id) => document.getElementById(id);

/** Make an element; a property that is a function listens to the event of its name. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, value === true ? "" : value);
    }
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** A drawing of the page by its name. */
function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const use = document.createElementNS(space, "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("viewBox", "0 0 20 20");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

function setIcon(button, name) {
  button.querySelector("use").setAttribute("href", `#i-${name}`);
}

function button(text, click, kind = "quiet") {
  return make("button", { class: kind, click }, text);
}

/** A button that shows an icon and is read as its label. */
function iconButton(name, label, click) {
  const made = button(icon(name), click, "plain");
  made.title = label;
  made.setAttribute("aria-label", label);
  return made;
}

/** Copy a text; outside of https and localhost browsers have no clipboard but that of a selection. */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const box = make("textarea", { class: "unseen", "aria-hidden": "true" });
    box.value = text;
    document.body.append(box);
    box.select();
    document.execCommand("copy");
    box.remove();
  }
}

/** A button that copies what `text` returns, and shows for a moment that it did. */
function copyButton(label, text) {
  const made = iconButton("copy", label, async () => {
    await copy(text());
    setIcon(made, "done");
    say("Copied");
    made.focus();
    setTimeout(() => setIcon(made, "copy"), 1500);
  });
  return made;
}

/** What an action gives, or null: a browser may have no storage, and a text be no JSON. */
function attempt(action) {
  try {
    return action();
  } catch {
    return null;
  }
}

/** Have a screen reader read a text when it has nothing else to read. */
function say(text) {
  $("announcer").textContent = "";
  // The same text twice is only heard as a change.
  setTimeout(() => ($("announcer").textContent = text), 30);
}

function number(count) {
  return count.toLocaleString("en");
}

function counted(count, unit) {
  return `${number(count)} ${unit}${count === 1 ? "" : "s"}`;
}

/** Offer a text as a file. */
function download(name, type, text) {
  const link = make("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/** Ask something in a dialog; gives what was typed (or true), and null where it was cancelled. */
function ask({ title, text = "", yes, value = null, secret = false }) {
  const dialog = $("asked");
  const field = $("asked-value");
  $("asked-title").textContent = title;
  $("asked-text").textContent = text;
  $("asked-yes").textContent = yes;
  field.hidden = value === null;
  field.type = secret ? "password" : "text";
  field.value = value ?? "";
  dialog.showModal();
  (value === null ? $("asked-yes") : field).focus();
  field.select();
  return new Promise((resolve) => {
    let answer = null;
    const accept = () => {
      answer = value === null ? true : field.value.trim();
      dialog.close();
    };
    $("asked-yes").onclick = accept;
    field.onkeydown = (event) => {
      if (event.key === "Enter" && !event.isComposing) {
        event.preventDefault();
        accept();
      }
    };
    dialog.onclose = () => {
      field.value = "";
      resolve(answer);
    };
  });
}
