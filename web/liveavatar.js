// The pack's part of ComfyUI's page: registers, listens, and hands over. The only file here with side effects.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { Monitor } from "./monitor.mjs";
import { Player } from "./player.mjs";
import { LIVE_PLAYER, settings } from "./settings.mjs";
import { addTable, showTable } from "./table.mjs";
import { learn, nameChoices } from "./words.mjs";

const PLAYER_HEIGHT = 240;
const players = new WeakMap(); // by node

/**
 * The frontend shows the finished video by itself. It keeps a running node's last preview too, which would stand before
 * it for good, and the player would be a second one.
 */
function showFinished({ detail }) {
  const id = detail.display_node ?? detail.node;
  const node = findNode(String(id));
  if (node?.comfyClass !== "LiveAvatar_Decode") return;
  delete app.nodePreviewImages[id];
  node.imgs = undefined;
  const preview = node.widgets?.find((widget) => widget.name === "$$canvas-image-preview");
  if (preview) node.removeWidget(preview);
  players.get(node)?.giveWay();
}

/** While the player shows the video, pictures of it beside it would only be in the way. */
function keepPreviewFromPlayer(event) {
  if (players.get(findNode(event.detail.displayNodeId))?.replacesPreviews) event.stopImmediatePropagation();
}

api.addEventListener("b_preview_with_metadata", keepPreviewFromPlayer); // now: before the frontend listens itself

function addPlayer(node) {
  if (node.comfyClass !== "LiveAvatar_Decode") return;
  const player = new Player((shown) => {
    widget.hidden = !shown;
    const [width, height] = node.computeSize();
    if (shown) node.setSize([Math.max(width, node.size[0]), Math.max(height, node.size[1])]);
    node.setDirtyCanvas(true, true);
  });
  players.set(node, player);
  const widget = node.addDOMWidget("player", "liveavatar_player", player.element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => PLAYER_HEIGHT,
  });
  widget.hidden = true; // else it would lie over what is below the node, and take the clicks
  const removed = node.onRemoved;
  node.onRemoved = function (...args) {
    player.release();
    return removed?.apply(this, args);
  };
}

/** A node by the id it runs under, which names the subgraphs around it: "7", "5:12". */
function findNode(path) {
  let graph = app.rootGraph ?? app.graph;
  let node;
  for (const id of path.split(":")) {
    node = graph?.getNodeById(Number(id));
    graph = node?.subgraph;
  }
  return node;
}

function showStream(state, joining = false) {
  if (!app.extensionManager.setting.get(LIVE_PLAYER)) return;
  players.get(findNode(state.node))?.tell(state, { joining });
}

async function joinStreams() {
  const answer = await api.fetchApi("/liveavatar/streams");
  if (!answer.ok) return;
  for (const state of await answer.json()) if (!state.ended) showStream(state, true);
}

app.registerExtension({
  name: "LiveAvatar.Settings",
  settings,
  init: () => learn(app.extensionManager.setting.get("Comfy.Locale")),
  nodeCreated: nameChoices,
});

app.registerExtension({
  name: "LiveAvatar.Tables",
  setup() {
    api.addEventListener("executed", ({ detail }) => {
      if (detail.output?.text) showTable(findNode(String(detail.display_node ?? detail.node)), detail.output.text[0]);
    });
  },
  nodeCreated: addTable,
});

app.registerExtension({
  name: "LiveAvatar.Decode",
  setup() {
    api.addEventListener("executed", showFinished);
    api.addEventListener("liveavatar.stream", ({ detail }) => showStream(detail));
  },
  nodeCreated: addPlayer,
  afterConfigureGraph: joinStreams,
});

const monitor = new Monitor();

async function joinRun() {
  const answer = await api.fetchApi("/liveavatar/pipeline");
  if (answer.ok) monitor.tell(await answer.json());
}

app.registerExtension({
  name: "LiveAvatar.Pipeline",
  bottomPanelTabs: [
    {
      id: "liveavatar-pipeline",
      title: "Live Avatar",
      type: "custom",
      render: (place) => monitor.moveTo(place),
    },
  ],
  async setup() {
    const joined = joinRun(); // spans are told once: these come first
    api.addEventListener("liveavatar.pipeline", async ({ detail }) => {
      await joined;
      monitor.tell(detail);
    });
    api.addEventListener("reconnected", joinRun);
    await joined;
  },
});
