// node open_help.mjs URL SHOTS
//
// In Chinese and in English: opens the help of each of the pack's nodes, and prints what it and the node show as one JSON
// object {language: {node: …}, problems}. It judges nothing: that is test_help.py's part.

import { join } from 'node:path'
import { openPage } from './page.mjs'
import { reopen } from './settings.mjs'

const [url, shots] = process.argv.slice(2)
const { page, problems, close } = await openPage(url)
const seen = {}
for (const language of ['zh', 'en']) {
  await reopen(page, { 'Comfy.Locale': language })
  seen[language] = await openHelp(language)
}
// The host remembers that this panel is open, and would open it in other tests' pages.
await page.evaluate(() => app.extensionManager.setting.set('Comfy.RightSidePanel.IsOpen', false))
await close()
console.log(JSON.stringify({ ...seen, problems }))

async function openHelp(language) {
  const types = await page.evaluate(() => {
    app.graph.clear()
    return Object.keys(LiteGraph.registered_node_types).filter((type) => type.startsWith('LiveAvatar_'))
  })
  const help = {}
  for (const type of types) {
    help[type] = await page.evaluate((type) => {
      const node = LiteGraph.createNode(type)
      app.graph.add(node)
      app.canvas.selectNode(node)
      const choices = (node.widgets ?? []).map(({ name, value, options }) => [name, options?.getOptionLabel?.(value) ?? value])
      return { title: node.title, inputs: node.inputs.map((input) => input.label ?? input.localized_name), choices: Object.fromEntries(choices) }
    }, type)
    if (type === types[0]) await page.click('[data-testid=info-button]')
    const opened = await page.waitForFunction((title) => {
      const help = document.querySelector('.node-help-content .markdown-content')
      const image = help?.querySelector('img')
      if (help?.querySelector('h1')?.textContent !== title || (image && !image.complete)) return false
      return { alt: image?.alt, src: image?.src, width: image?.naturalWidth ?? 0 }
    }, help[type].title, { timeout: 120_000 })
    Object.assign(help[type], await opened.jsonValue())
    if (type === 'LiveAvatar_Sampler') await page.screenshot({ path: join(shots, `help-${language}.png`) })
  }
  return help
}
