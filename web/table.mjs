// The table that a run leaves in a node, with its columns under each other; the host's own line of text is too narrow.

const NODES = new Set(['LiveAvatar_MemoryPlan', 'LiveAvatar_Benchmark', 'LiveAvatar_Evaluate'])
const LEAST_WIDTH = 460
const tables = new WeakMap() // by node

export function addTable(node) {
  if (!NODES.has(node.comfyClass)) return
  const place = document.createElement('pre')
  place.style.cssText = 'display:none; margin:0; padding:8px; overflow:auto; white-space:pre-wrap; height:100%; font:11px monospace; user-select:text'
  tables.set(node, place)
  const height = () => (place.textContent ? place.textContent.split('\n').length * 15 + 40 : 0)
  node.addDOMWidget('table', 'liveavatar_table', place, { serialize: false, hideOnZoom: false, getMinHeight: height })
}

export function showTable(node, text) {
  const place = tables.get(node)
  if (!place) return
  place.textContent = text
  place.style.display = ''
  const [width, height] = node.computeSize()
  node.setSize([Math.max(width, node.size[0], LEAST_WIDTH), Math.max(height, node.size[1])])
}
