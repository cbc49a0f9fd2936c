// The list of conversations, and what can be done with the one that is shown.

const narrow = matchMedia("(max-width: 820px)");

function showConversations() {
  $("conversations").replaceChildren(
    ...talks.map((talk) => {
      const choose = () => {
        open(talk);
        settle();
      };
      const made = button(make("span", { dir: "auto" }, talk.title), choose, "");
      made.title = talk.title;
      if (talk === current) made.ariaCurrent = "true";
      const dot = { class: "dot", role: "img", "aria-label": "answering" };
      if (runs.has(talk.id)) made.append(make("span", dot));
      return make("li", {}, made);
    }),
  );
}

/** Show a conversation, at its end. */
function open(talk) {
  if (current && current !== talk) current.draft = $("box").value;
  current = talk;
  $("box").value = talk.draft ?? "";
  grow();
  showConversation();
  showConversations();
  toEnd();
  prefer({ last: talk.id });
}

function begin() {
  open(newConversation());
  settle();
}

/** Go to where one writes; on a phone, its keyboard would cover what is to be read. */
function settle() {
  if (narrow.matches) showDrawer(false);
  $(narrow.matches ? "toggle" : "box").focus();
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
  const talk = current;
  const title = await ask({ title: "Rename the conversation", yes: "Rename", value: talk.title });
  if (!title) return;
  Object.assign(talk, { title: title.slice(0, 200), named: true });
  keep(talk);
  showConversation();
  showConversations();
}

async function remove() {
  const talk = current;
  const text = `“${talk.title}” is in this browser alone, and cannot be brought back.`;
  const sure = await ask({ title: "Delete the conversation?", text, yes: "Delete" });
  if (!sure) return;
  stop(talk);
  // An answer that still ends must not bring it back.
  talk.leaf = null;
  forget(talk);
  talks = talks.filter((each) => each !== talk);
  open(talks[0] ?? newConversation());
  settle();
}

function save(ending, type, text) {
  const name = current.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 60);
  download(`${name || "conversation"}.${ending}`, type, text);
}

async function openFile(file) {
  const talk = file.size > 20e6 ? null : fromJson(await file.text());
  if (talk === null) {
    notice(`${file.name} holds no conversation, as this page or /save of quintet chat writes it.`);
    return;
  }
  talks.unshift(talk);
  keep(talk);
  open(talk);
}

/** Take over what another tab of this browser changed. */
function hearOtherTabs(event) {
  if (runs.size || !event.key?.startsWith(CHAT)) return;
  talks = storedConversations();
  const same = talks.find((each) => each.id === current.id);
  if (!same || same.updated === current.updated) showConversations();
  else open(Object.assign(same, { draft: $("box").value }));
}
