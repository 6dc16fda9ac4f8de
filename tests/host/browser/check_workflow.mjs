// node check_workflow.mjs URL WORKFLOW.json SHOTS SECONDS
//
// Opens a workflow in UI form as a person would, exports it to API form, presses Run, waits for the end, and prints
// what it saw as one JSON object. It judges nothing: that is test_browser.py's part.

import { readFileSync } from 'node:fs'
import { basename, join } from 'node:path'
import { openPage } from './page.mjs'

const [url, file, shots, seconds] = process.argv.slice(2)
const name = basename(file, '.json')
const { page, problems, close } = await openPage(url)
const shoot = (moment) => page.screenshot({ path: join(shots, `${name}-${moment}.png`) })

const opened = await page.evaluate(async ([workflow, name]) => {
  await app.loadGraphData(workflow, true, true, name)
  await new Promise((done) => setTimeout(done, 1000)) // widgets fetch their previews
  await app.extensionManager.command?.execute('Comfy.Canvas.FitView')
  const nodes = []
  const visit = (graph) => graph.nodes.forEach((node) => { nodes.push(node); if (node.subgraph) visit(node.subgraph) })
  visit(app.graph)
  const { output } = await app.graphToPrompt()
  return {
    missing: nodes.filter((n) => !n.subgraph && !LiteGraph.registered_node_types[n.type]).map((n) => n.type),
    marked: nodes.filter((node) => node.has_errors).map((node) => `${node.type} (node ${node.id})`),
    dialog: document.querySelector('[role=dialog]')?.innerText ?? null,
    api: output,
  }
}, [JSON.parse(readFileSync(file, 'utf8')), name])
await page.waitForTimeout(1000) // the fitted view is animated
await shoot('opened')
await makeSmall()

const run = await pressRun()
await page.waitForTimeout(1000)
await shoot('finished')
await close()
console.log(JSON.stringify({ ...opened, ...run, problems }))

// Full size takes a GPU; a person without one would choose a small picture and a short sound, in the same widgets.
async function makeSmall() {
  await page.evaluate(() => {
    const small = { LiveAvatar_ImageLoader: { width: 96, height: 64 }, LiveAvatar_AudioEncoder: { seconds: 1 } }
    for (const node of app.graph.nodes)
      for (const [name, value] of Object.entries(small[node.type] ?? {})) {
        node.disconnectInput(node.findInputSlot(name)) // a preset's, perhaps
        node.widgets.find((widget) => widget.name === name).value = value
      }
  })
}

async function pressRun() {
  const [answer] = await Promise.all([
    page.waitForResponse((response) => response.url().endsWith('/prompt') && response.request().method() === 'POST'),
    page.evaluate(() => app.queuePrompt(0)),
  ])
  const queued = await answer.json()
  if (answer.status() !== 200 || Object.keys(queued.node_errors ?? {}).length) return { status: 'refused', detail: queued }
  const deadline = Date.now() + Number(seconds) * 1000
  let halfway = false
  while (Date.now() < deadline) {
    const history = await (await fetch(`${url}/history/${queued.prompt_id}`)).json()
    const entry = history[queued.prompt_id]
    if (entry) return { status: entry.status.status_str, detail: entry.status.messages, outputs: entry.outputs }
    if (!halfway && await page.evaluate(() => Boolean(app.runningNodeId))) { halfway = true; await shoot('running') }
    await page.waitForTimeout(200)
  }
  return { status: 'timeout', detail: `no end within ${seconds} s` }
}
