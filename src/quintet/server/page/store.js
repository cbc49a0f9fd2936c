// Conversations, kept in this browser: each under a key of its own. A conversation is a tree of
// messages, since an edited message or another answer leaves what was there; `leaf` is the end of
// the branch that is shown.

const CHAT = "quintet.chat.";
const PREFERENCES = "quintet.preferences";
const preferences = read(PREFERENCES) ?? {};

function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null; // no storage, or not ours
  }
}

/** Keep a value, and tell whether the browser had room for it. */
function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

function prefer(changes) {
  write(PREFERENCES, Object.assign(preferences, changes));
}

function isConversation(value) {
  return (
    typeof value === "object" && value !== null && typeof value.id === "string" && typeof value.title === "string" &&
    typeof value.messages === "object" && value.messages !== null && typeof value.settings === "object" && value.settings !== null &&
    Object.values(value.messages).every((each) => each && (each.role === "user" || each.role === "assistant") && typeof each.content === "string")
  );
}

/** Every conversation in this browser, the latest first. */
function storedConversations() {
  let keys = [];
  try {
    keys = Object.keys(localStorage).filter((key) => key.startsWith(CHAT));
  } catch {
    // There is no storage: conversations last as long as the page.
  }
  const found = keys.map(read).filter(isConversation);
  return found.sort((a, b) => b.updated - a.updated);
}

function newConversation() {
  const settings = { ...preferences.settings };
  return { id: newId(), title: "New conversation", model: preferences.model, settings, messages: {}, leaf: null, updated: Date.now() };
}

function newId() {
  return Array.from(crypto.getRandomValues(new Uint32Array(3)), (part) => part.toString(36)).join("");
}

/** Keep a conversation; one without a message is not worth a place. */
function keep(conversation) {
  if (conversation.leaf === null) return;
  if (!write(CHAT + conversation.id, conversation)) {
    notice("This browser has no room left: export or delete conversations, or this one is lost with the page.");
  }
}

function forget(conversation) {
  try {
    localStorage.removeItem(CHAT + conversation.id);
  } catch {
    // It was never kept.
  }
}

/** Put a message behind its parent, at the end of the branch that is shown. */
function addMessage(conversation, message) {
  const id = newId();
  conversation.messages[id] = { id, parent: conversation.leaf, at: Date.now(), ...message };
  conversation.leaf = id;
  conversation.updated = Date.now();
  return conversation.messages[id];
}

/** Take a message without answers away. */
function dropMessage(conversation, message) {
  delete conversation.messages[message.id];
  if (conversation.leaf === message.id) conversation.leaf = message.parent;
}

/** The messages of the branch that is shown, in order. */
function branch(conversation) {
  const messages = [];
  // A file may hold anything, a circle too.
  const seen = new Set();
  for (let id = conversation.leaf; id && !seen.has(id) && conversation.messages[id]; id = conversation.messages[id].parent) {
    seen.add(id);
    messages.push(conversation.messages[id]);
  }
  return messages.reverse();
}

function childrenOf(conversation, parent) {
  return Object.values(conversation.messages).filter((message) => message.parent === parent);
}

/** Show the branch through a message, to the end that was added last. */
function showBranch(conversation, message) {
  const seen = new Set();
  let next = message;
  while (next && !seen.has(next.id)) {
    seen.add(next.id);
    conversation.leaf = next.id;
    next = childrenOf(conversation, next.id).at(-1);
  }
}

/** The branch as `quintet chat` saves and loads it. */
function asJson(conversation) {
  const { system } = conversation.settings;
  const messages = branch(conversation).map(({ role, content, reasoning }) => ({ role, content, ...(reasoning && { reasoning_content: reasoning }) }));
  if (system) messages.unshift({ role: "system", content: system });
  return JSON.stringify({ title: conversation.title, model: conversation.model, messages }, null, 2) + "\n";
}

function asMarkdown(conversation) {
  const { system } = conversation.settings;
  const parts = [`# ${conversation.title}`];
  if (system) parts.push(`**System**\n\n${system}`);
  for (const { role, content } of branch(conversation)) parts.push(`**${role === "user" ? "You" : "Answer"}**\n\n${content}`);
  return parts.join("\n\n") + "\n";
}

/** Read what `asJson` or `quintet chat` wrote; null if it is something else. */
function fromJson(text) {
  let saved = null;
  try {
    saved = JSON.parse(text);
  } catch {
    return null;
  }
  const known = (each) => ["system", "user", "assistant"].includes(each?.role) && typeof each.content === "string";
  if (!Array.isArray(saved?.messages) || !saved.messages.length || !saved.messages.every(known)) return null;
  const conversation = newConversation();
  conversation.settings.system = saved.messages.find((each) => each.role === "system")?.content ?? "";
  for (const { role, content, reasoning_content: reasoning } of saved.messages) {
    if (role !== "system") addMessage(conversation, { role, content, ...(typeof reasoning === "string" && { reasoning }) });
  }
  conversation.title = typeof saved.title === "string" ? saved.title : titleFor(saved.messages.find((each) => each.role === "user")?.content ?? "");
  return conversation;
}

function titleFor(text) {
  const line = text.trim().split("\n", 1)[0];
  return line.length > 60 ? `${line.slice(0, 58).trimEnd()}…` : line || "New conversation";
}
