// `props.value` is the query of the settings of the shown images; the address has it once something is drawn.
const button = element.querySelector("button");
const link = () => new URL(`?${props.value}`, location.href).href;
const say = (text) => {
  button.textContent = text;
  setTimeout(() => (button.textContent = "Copy link"), 2000);
};

watch("value", () => history.replaceState(null, "", link()));
button.addEventListener("click", async () => {
  history.replaceState(null, "", link());
  try {
    await navigator.clipboard.writeText(link());
    say("Copied");
  } catch {
    say("See the address"); // the browser lets only pages of a secure origin copy
  }
});

// names with two underscores belong to Gradio and the Hub
const names = [...new URLSearchParams(location.search).keys()];
if (names.some((name) => !name.startsWith("__"))) trigger("submit", { query: location.search.slice(1) });
