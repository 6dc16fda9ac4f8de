// node open_workflows.mjs URL WORKFLOWS BLUEPRINT SHOTS SECONDS
//
// Opens each workflow of a folder in UI form as a person would, exports it to API form, presses Run on a small form of
// it and waits for the end; then opens each again in Chinese. The blueprint is placed between stock nodes and run, too.
// Prints what it saw as one JSON object, by name, and judges nothing: that is test_browser.py's part.

import { readFileSync, readdirSync } from 'node:fs'
import { basename, join } from 'node:path'
import { openPage, untilReady } from './page.mjs'

const [url, folder, blueprint, shots, seconds] = process.argv.slice(2)
const { page, problems, close } = await openPage(url)
const shoot = (name) => page.screenshot({ path: join(shots, `${name}.png`) })
const read = (path) => JSON.parse(readFileSync(path, 'utf8'))
const names = readdirSync(folder).filter((name) => name.endsWith('.json')).map((name) => basename(name, '.json'))
const seen = {}
const loading = new Set()
page.on('request', (request) => loading.add(request))
for (const end of ['requestfinished', 'requestfailed']) page.on(end, (request) => loading.delete(request))

try {
  for (const name of names) {
    const opened = await open(name, read(join(folder, `${name}.json`)))
    await shoot(`${name}-opened`)
    await makeSmall()
    seen[name] = { ...opened, ...(await pressRun()), problems: problems.splice(0) }
    await shoot(`${name}-finished`)
  }
  const placed = await open('blueprint', amidStockNodes(read(blueprint)))
  await makeSmall()
  seen.blueprint = { ...placed, ...(await pressRun()), problems: problems.splice(0) }
  await shoot('blueprint-finished')

  await speak('zh')
  await page.reload({ waitUntil: 'domcontentloaded' })
  await untilReady(page)
  for (const name of names) {
    seen[name].chinese = { ...(await open(name, read(join(folder, `${name}.json`)))), problems: problems.splice(0) }
    await shoot(`${name}-chinese`)
  }
} finally {
  await speak('en')
  await close()
}
console.log(JSON.stringify(seen))

// Kept by the server, for its other pages too.
async function speak(language) {
  await page.evaluate((language) => app.extensionManager.setting.set('Comfy.Locale', language), language)
}

async function open(name, workflow) {
  await page.evaluate(([workflow, name]) => app.loadGraphData(workflow, true, true, name), [workflow, name])
  await settled() // widgets fetch their previews
  const opened = await page.evaluate(async () => {
    app.canvas.min_font_size_for_lod = 0 // small print, too
    await app.extensionManager.command.execute('Comfy.Canvas.FitView')
    const nodes = []
    const visit = (graph) => graph.nodes.forEach((node) => { nodes.push(node); if (node.subgraph) visit(node.subgraph) })
    visit(app.graph)
    const box = (node) => [node.title, ...node.pos, ...node.size]
    return {
      missing: nodes.filter((n) => !n.subgraph && !LiteGraph.registered_node_types[n.type]).map((n) => n.type),
      marked: nodes.filter((node) => node.has_errors).map((node) => `${node.type} (node ${node.id})`),
      dialog: document.querySelector('[role=dialog]')?.innerText ?? null,
      titles: nodes.filter((node) => node.type.startsWith('LiveAvatar_')).map((node) => node.title),
      boxes: app.graph.nodes.map(box),
      api: (await app.graphToPrompt()).output,
    }
  })
  await settled() // the fitted view is animated
  return opened
}

// Nothing is being fetched and the view has stood still for a while; sounds may be fetched as long as they please.
async function settled() {
  const deadline = Date.now() + 700
  do {
    await page.evaluate(async () => {
      const frame = () => new Promise((done) => requestAnimationFrame(done))
      for (let same = 0, before; same < 4; ) {
        await frame()
        const view = String([app.canvas.ds.scale, ...app.canvas.ds.offset])
        same = view === before ? same + 1 : 0
        before = view
      }
    })
  } while (loading.size && Date.now() < deadline)
}

// Full size takes a GPU; a person without one would choose a small picture and a short sound, in the same widgets.
async function makeSmall() {
  await page.evaluate(() => {
    const small = { LiveAvatar_ImageLoader: { width: 96, height: 64 }, LiveAvatar_AudioEncoder: { seconds: 0.5 } }
    const shrink = (graph) => graph.nodes.forEach((node) => {
      if (node.subgraph) shrink(node.subgraph)
      for (const [name, value] of Object.entries(small[node.type] ?? {})) {
        node.disconnectInput(node.findInputSlot(name)) // a preset's, perhaps
        node.widgets.find((widget) => widget.name === name).value = value
      }
    })
    shrink(app.graph)
  })
}

// Load Image and Load Audio before the blueprint's one node, Save Video after it.
function amidStockNodes(workflow) {
  const [avatar] = workflow.nodes
  const stock = (id, type, values) => ({ id, type, pos: [-500, (id - 2) * 450], size: [400, 350], widgets_values: values })
  workflow.nodes.push(
    { ...stock(2, 'LoadImage', ['portrait.png', 'image']), outputs: [{ name: 'IMAGE', type: 'IMAGE', links: [1] }] },
    { ...stock(3, 'LoadAudio', ['speech.wav', null, '']), outputs: [{ name: 'AUDIO', type: 'AUDIO', links: [2] }] },
    {
      ...stock(4, 'SaveVideo', ['video/blueprint', 'auto', 'auto']),
      pos: [550, 0],
      inputs: [{ name: 'video', type: 'VIDEO', link: 3 }],
    },
  )
  avatar.inputs.forEach((input, slot) => (input.link = slot + 1))
  avatar.outputs[0].links = [3]
  workflow.links = [[1, 2, 0, avatar.id, 0, 'IMAGE'], [2, 3, 0, avatar.id, 1, 'AUDIO'], [3, avatar.id, 0, 4, 0, 'VIDEO']]
  return { ...workflow, last_node_id: 4, last_link_id: 3 }
}

async function pressRun() {
  const [answer] = await Promise.all([
    page.waitForResponse((response) => response.url().endsWith('/prompt') && response.request().method() === 'POST'),
    page.evaluate(() => {
      window.ended = false
      for (const end of ['execution_success', 'execution_error', 'execution_interrupted'])
        app.api.addEventListener(end, () => (window.ended = true), { once: true })
      return app.queuePrompt(0)
    }),
  ])
  const queued = await answer.json()
  if (answer.status() !== 200 || Object.keys(queued.node_errors ?? {}).length) return { status: 'refused', detail: queued }
  const deadline = Date.now() + Number(seconds) * 1000
  while (Date.now() < deadline) {
    const history = await (await fetch(`${url}/history/${queued.prompt_id}`)).json()
    const entry = history[queued.prompt_id]
    if (entry) {
      await page.waitForFunction(() => window.ended)
      await settled() // the results are shown
      return { status: entry.status.status_str, detail: entry.status.messages }
    }
    await page.waitForTimeout(100)
  }
  return { status: 'timeout', detail: `no end within ${seconds} s` }
}
