// The page comes to life: buttons, keys, and what was kept from the last time.

const showHelp = () => $("shortcuts").showModal();
const SHORTCUTS = { "shift o": begin, b: toggleDrawer, ",": showSettings, "/": showHelp };

/** Say something above the conversation until it is taken away. */
function notice(text, again = null) {
  const close = () => $("notice").replaceChildren();
  $("notice").replaceChildren(make("p", {}, text), iconButton("close", "Close", close));
  if (again) $("notice").append(button("Try again", () => (close(), again())));
}

/** Make the box as high as its text, up to a limit of the style. */
function grow() {
  const box = $("box");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}

function submit() {
  const text = $("box").value.trim();
  if (!text || runs.has(current.id)) return;
  $("box").value = "";
  grow();
  send(text);
}

function hearKeys(event) {
  // Dialogs have keys of their own.
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") {
    if ($("menu").open) closeMenu();
    else if (!$("shade").hidden) toggleDrawer();
    else stop();
  }
  if (!event.ctrlKey && !event.metaKey) return;
  const act = SHORTCUTS[(event.shiftKey ? "shift " : "") + event.key.toLowerCase()];
  if (!act) return;
  event.preventDefault();
  act();
}

function hearBox(event) {
  if (sends(event)) {
    event.preventDefault();
    submit();
  } else if (event.key === "ArrowUp" && !$("box").value) {
    const last = branch(current).findLast((message) => message.role === "user");
    if (last) {
      event.preventDefault();
      editMessage(last);
    }
  }
}

function closeMenu() {
  $("menu").open = false;
  $("menu").querySelector("summary").focus();
}

function listen() {
  for (const element of document.querySelectorAll("[data-icon]")) element.prepend(icon(element.dataset.icon));
  $("composer").onsubmit = (event) => {
    event.preventDefault();
    if (runs.has(current.id)) stop();
    else submit();
  };
  $("box").onkeydown = hearBox;
  $("box").oninput = () => {
    grow();
    showState();
  };
  $("file").onchange = async () => {
    if ($("file").files[0]) await openFile($("file").files[0]);
    $("file").value = "";
  };
  $("system").oninput = () => set("system", $("system").value);
  $("thinking").onchange = () => set("thinking", $("thinking").value);
  $("key").onchange = () => {
    setApiKey($("key").value.trim());
    if (!models.length) loadModels();
  };
  $("model").onchange = () => chooseModel($("model").value);
  $("scroll").onscroll = () => ($("latest").hidden = atEnd());
  for (const [id, act] of Object.entries({
    new: begin,
    toggle: toggleDrawer,
    shade: toggleDrawer,
    theme: nextTheme,
    help: showHelp,
    import: () => $("file").click(),
    tune: showSettings,
    defaults: backToDefaults,
    latest: toEnd,
  })) {
    $(id).onclick = act;
  }
  for (const [id, act] of Object.entries({
    rename,
    delete: remove,
    "save-markdown": () => save("md", "text/markdown", asMarkdown(current)),
    "save-json": () => save("json", "application/json", asJson(current)),
  })) {
    $(id).onclick = () => {
      closeMenu();
      act();
    };
  }
  for (const each of document.querySelectorAll("[data-close]")) {
    each.onclick = () => each.closest("dialog").close();
  }
  document.addEventListener("click", (event) => {
    if ($("menu").open && !$("menu").contains(event.target)) $("menu").open = false;
    // The shade of a dialog is the dialog itself, outside of what it holds.
    if (event.target instanceof HTMLDialogElement) event.target.close();
  });
  document.addEventListener("keydown", hearKeys);
  addEventListener("storage", hearOtherTabs);
  addEventListener("pagehide", () => {
    for (const talk of talks) if (runs.has(talk.id)) keep(talk);
  });
  narrow.addEventListener("change", () => showDrawer(!narrow.matches && (preferences.drawer ?? true)));
}

showTheme(THEMES.includes(preferences.theme) ? preferences.theme : "system");
makeFields();
listen();
talks = storedConversations();
current = talks.find((each) => each.id === preferences.last) ?? newConversation();
showDrawer(!narrow.matches && (preferences.drawer ?? true));
open(current);
loadModels();
$("box").focus();
