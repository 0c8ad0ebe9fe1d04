// A page is printed in its light colours, whatever the screen shows.
(() => {
  const page = document.documentElement;
  let shown;
  addEventListener("beforeprint", () => { shown = page.dataset.theme; page.dataset.theme = "light"; });
  addEventListener("afterprint", () => { if (shown) page.dataset.theme = shown; });
})();
