// The pack's part of ComfyUI's page: registers, listens, and hands over. The only file here with side effects.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

/** The frontend keeps a running node's last preview, which would cover the finished video for good. */
function dropPreview({ detail }) {
  const id = detail.display_node ?? detail.node;
  if (app.graph.getNodeById(id)?.comfyClass === "LiveAvatar_Decode") delete app.nodePreviewImages[id];
}

app.registerExtension({
  name: "LiveAvatar.Decode",
  setup() {
    api.addEventListener("executed", dropPreview);
  },
});
