// What the pack's own elements say, in the page's language. The host translates nodes, settings and commands by itself,
// but not the choices in a node's lists: here their words are put over the values.

import { api } from '../../scripts/api.js'

let texts = {} // of locales/<language>

/** Learn a language. Without it, and where it has no word, English is said, as it stands in the code. */
export async function learn(language) {
  texts = (await api.getCustomNodesI18n())[language] ?? {}
}

/** A sentence of the code, in the page's language; {name} in it stands for values.name. */
export function say(sentence, values = {}) {
  return (texts.liveAvatar?.[sentence] ?? sentence).replace(/\{(\w+)\}/g, (_, name) => values[name])
}

/** Show a node's choices in words. The values, which workflows hold, stay as they are. */
export function nameChoices(node) {
  for (const widget of node.widgets ?? []) {
    const names = texts.nodeDefs?.[node.comfyClass]?.inputs?.[widget.name]?.options
    if (names) widget.options.getOptionLabel = (value) => names[value] ?? value
  }
}
