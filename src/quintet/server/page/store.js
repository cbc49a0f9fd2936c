// Conversations, kept in this browser: each under a key of its own. A conversation is a tree of
// messages, since an edited message or another answer leaves what was there; `leaf` is the end of
// the branch that is shown.

const CHAT = "quintet.chat.";
const PREFERENCES = "quintet.preferences";
const UNNAMED = "New conversation";
const preferences = read(PREFERENCES) ?? {};

function read(key) {
  return attempt(() => JSON.parse(localStorage.getItem(key)));
}

/** Keep a value, and tell whether the browser had room for it. */
function write(key, value) {
  return attempt(() => !localStorage.setItem(key, JSON.stringify(value)));
}

function prefer(changes) {
  write(PREFERENCES, Object.assign(preferences, changes));
}

function isConversation(value) {
  const { id, title, messages, settings } = value ?? {};
  if (typeof id !== "string" || typeof title !== "string" || !settings || !messages) return false;
  return Object.values(messages).every(isMessage);
}

function isMessage(value) {
  return ["system", "user", "assistant"].includes(value?.role) && typeof value.content === "string";
}

/** Every conversation in this browser, the latest first. */
function storedConversations() {
  const keys = attempt(() => Object.keys(localStorage)) ?? [];
  const found = keys.filter((key) => key.startsWith(CHAT)).map(read).filter(isConversation);
  return found.sort((a, b) => b.updated - a.updated);
}

function newConversation() {
  const settings = { ...preferences.settings };
  const { model } = preferences;
  return { id: newId(), title: UNNAMED, model, settings, messages: {}, leaf: null, updated: Date.now() };
}

function newId() {
  return Array.from(crypto.getRandomValues(new Uint32Array(3)), (part) => part.toString(36)).join("");
}

/** Keep a conversation; one without a message is not worth a place. */
function keep(talk) {
  if (talk.leaf === null) return;
  if (!write(CHAT + talk.id, talk)) {
    notice("This browser has no room left; export this conversation, or delete others.");
  }
}

function forget(talk) {
  attempt(() => localStorage.removeItem(CHAT + talk.id));
}

/** Put a message behind its parent, at the end of the branch that is shown. */
function addMessage(talk, message) {
  const id = newId();
  talk.messages[id] = { id, parent: talk.leaf, at: Date.now(), ...message };
  talk.leaf = id;
  talk.updated = Date.now();
  return talk.messages[id];
}

/** Take a message without answers away. */
function dropMessage(talk, message) {
  delete talk.messages[message.id];
  if (talk.leaf === message.id) talk.leaf = message.parent;
}

/** The messages of the branch that is shown, in order. */
function branch(talk) {
  const messages = [];
  // A file may hold anything, a circle too.
  const seen = new Set();
  for (let next = talk.messages[talk.leaf]; next && !seen.has(next); next = talk.messages[next.parent]) {
    seen.add(next);
    messages.unshift(next);
  }
  return messages;
}

function childrenOf(talk, parent) {
  return Object.values(talk.messages).filter((message) => message.parent === parent);
}

/** Show the branch through a message, to the end that was added last. */
function showBranch(talk, message) {
  for (let next = message; next; next = childrenOf(talk, next.id).at(-1)) talk.leaf = next.id;
}

/** The branch as `quintet chat` saves and loads it. */
function asJson(talk) {
  const { system } = talk.settings;
  const messages = branch(talk).map(({ role, content, reasoning }) => {
    return { role, content, ...(reasoning && { reasoning_content: reasoning }) };
  });
  if (system) messages.unshift({ role: "system", content: system });
  return JSON.stringify({ title: talk.title, model: talk.model, messages }, null, 2) + "\n";
}

function asMarkdown(talk) {
  const { system } = talk.settings;
  const parts = [`# ${talk.title}`];
  if (system) parts.push(`**System**\n\n${system}`);
  for (const { role, content } of branch(talk)) {
    parts.push(`**${role === "user" ? "You" : "Answer"}**\n\n${content}`);
  }
  return parts.join("\n\n") + "\n";
}

/** Read what `asJson` or `quintet chat` wrote; null if it is something else. */
function fromJson(text) {
  const saved = attempt(() => JSON.parse(text));
  if (!Array.isArray(saved?.messages) || !saved.messages.every(isMessage)) return null;
  const talk = newConversation();
  talk.settings.system = saved.messages.find((each) => each.role === "system")?.content ?? "";
  for (const { role, content, reasoning_content: thought } of saved.messages) {
    const reasoning = typeof thought === "string" ? thought : "";
    if (role !== "system") addMessage(talk, { role, content, reasoning });
  }
  talk.title = typeof saved.title === "string" ? saved.title : titleFor(branch(talk)[0]?.content ?? "");
  return talk.leaf && talk;
}

function titleFor(text) {
  const line = text.trim().split("\n", 1)[0];
  return line.length > 60 ? `${line.slice(0, 58)}…` : line || UNNAMED;
}
