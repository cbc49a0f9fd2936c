// The list of conversations, and what can be done with the one that is shown.

const narrow = matchMedia("(max-width: 820px)");

function showConversations() {
  $("conversations").replaceChildren(
    ...state.conversations.map((conversation) => {
      const current = conversation === state.current;
      const running = state.running.has(conversation.id);
      const choose = () => {
        open(conversation);
        if (narrow.matches) showDrawer(false);
        $("box").focus();
      };
      const button = make("button", { type: "button", title: conversation.title, "aria-current": current ? "true" : null, click: choose }, make("span", { dir: "auto" }, conversation.title));
      if (running) button.append(make("span", { class: "dot", role: "img", "aria-label": "answering" }));
      return make("li", {}, button);
    }),
  );
}

/** Show a conversation, at its end. */
function open(conversation) {
  if (state.current && state.current !== conversation) state.current.draft = $("box").value;
  state.current = conversation;
  $("box").value = conversation.draft ?? "";
  grow();
  showConversation();
  showConversations();
  toEnd();
  prefer({ last: conversation.id });
}

function begin() {
  open(newConversation());
  if (narrow.matches) showDrawer(false);
  $("box").focus();
}

function showDrawer(shown) {
  document.body.classList.toggle("with-drawer", shown);
  $("toggle").setAttribute("aria-expanded", String(shown));
  $("drawer").inert = !shown;
  const covers = shown && narrow.matches;
  $("shade").hidden = !covers;
  document.querySelector("main").inert = covers;
  if (!narrow.matches) prefer({ drawer: shown });
}

function toggleDrawer() {
  const shown = !document.body.classList.contains("with-drawer");
  showDrawer(shown);
  if (shown) $("new").focus();
  else $("toggle").focus();
}

async function rename() {
  const conversation = state.current;
  const title = await ask({ title: "Rename the conversation", yes: "Rename", value: conversation.title });
  if (!title) return;
  Object.assign(conversation, { title: title.slice(0, 200), named: true });
  keep(conversation);
  showConversation();
  showConversations();
}

async function remove() {
  const conversation = state.current;
  const sure = await ask({ title: "Delete the conversation?", text: `“${conversation.title}” is in this browser alone, and cannot be brought back.`, yes: "Delete" });
  if (!sure) return;
  stop(conversation);
  // An answer that still ends must not bring it back.
  conversation.leaf = null;
  forget(conversation);
  state.conversations = state.conversations.filter((each) => each !== conversation);
  open(state.conversations[0] ?? newConversation());
  $("box").focus();
}

function save(ending, type, text) {
  const name = state.current.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 60);
  download(`${name || "conversation"}.${ending}`, type, text);
}

async function openFile(file) {
  const conversation = file.size > 20e6 ? null : fromJson(await file.text());
  if (conversation === null) {
    notice(`${file.name} holds no conversation. What this page exports as JSON does, and what /save of quintet chat writes.`);
    return;
  }
  state.conversations.unshift(conversation);
  keep(conversation);
  open(conversation);
}

/** Take over what another tab of this browser changed. */
function hearOtherTabs(event) {
  if (!event.key?.startsWith(CHAT)) return;
  const id = event.key.slice(CHAT.length);
  if (state.running.has(id)) return;
  const changed = event.newValue === null ? null : read(event.key);
  const others = state.conversations.filter((each) => each.id !== id);
  state.conversations = isConversation(changed) ? [changed, ...others].sort((a, b) => b.updated - a.updated) : others;
  if (state.current.id !== id) showConversations();
  else if (isConversation(changed)) open(changed);
  else showConversations();
}
