// The pack's part of ComfyUI's page: registers, listens, and hands over. The only file here with side effects.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

/** The frontend keeps a running node's last preview, which would stand before the finished video for good. */
function dropPreview({ detail }) {
  const id = detail.display_node ?? detail.node;
  const node = app.graph.getNodeById(id);
  if (node?.comfyClass !== "LiveAvatar_Decode") return;
  delete app.nodePreviewImages[id];
  node.imgs = undefined;
  const preview = node.widgets?.find((widget) => widget.name === "$$canvas-image-preview");
  if (preview) node.removeWidget(preview);
}

app.registerExtension({
  name: "LiveAvatar.Decode",
  setup() {
    api.addEventListener("executed", dropPreview);
  },
});
