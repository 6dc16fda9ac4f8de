// Opens ComfyUI's page in a headless Chromium and keeps a list of everything that went wrong on it.
// Knows nothing of workflows. CHROMIUM is the browser's path, PLAYWRIGHT the folder of node_modules/playwright-core.

import { createRequire } from 'node:module'
import { join } from 'node:path'

const { chromium } = createRequire(join(process.env.PLAYWRIGHT, 'package.json'))('playwright-core')

// What the bare host says on every page, with no pack installed. It asks these two servers about models and nodes, and
// forbids itself to reach them; a failed resource is reported below, with its address. It also forbids itself media from
// memory: our player finds that out in this way, and plays otherwise.
const KNOWN_MESSAGES = [
  /ComfyApp graph accessed before initialization/,
  /^Failed to load resource/,
  /^Loading media from\s+'blob:.*Content Security Policy/s,
  /https:\/\/(huggingface\.co|api\.comfy\.org)\/.*Content Security Policy/s,
]
// It asks for a node's help in English before it takes the page for all languages, which is in English.
const KNOWN_MISSING = [/^\/(api\/)?user\.css$/, /^\/(api\/)?userdata(\/|$)/, /^\/(api\/)?settings\//, /\/docs\/\w+\/en\.md$/]

export function openBrowser() {
  return chromium.launch({
    executablePath: process.env.CHROMIUM,
    args: ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--proxy-server=direct://'],
  })
}

/** A page of its own, as another person's; `browser` to have several in one. `script` runs before the page's own. */
export async function openPage(url, { viewport = { width: 1600, height: 900 }, bypassCSP = false, browser, script } = {}) {
  const own = browser ? null : await openBrowser()
  const context = await (browser ?? own).newContext({ viewport, bypassCSP })
  if (script) await context.addInitScript(script)
  const page = await context.newPage()
  const problems = []
  page.on('pageerror', (error) => problems.push(`uncaught: ${error}`))
  page.on('console', (message) => {
    const text = message.text()
    if (message.type() === 'error' && !KNOWN_MESSAGES.some((known) => known.test(text))) problems.push(`console: ${text}`)
  })
  page.on('response', (response) => {
    const { pathname, search } = new URL(response.url())
    if (response.status() >= 400 && !KNOWN_MISSING.some((known) => known.test(pathname)))
      problems.push(`${response.status()} ${pathname}${search}`)
  })
  await page.goto(url, { waitUntil: 'domcontentloaded' })
  await untilReady(page)
  return { page, problems, close: () => (own ?? context).close() }
}

/** The page shows `app` before it has opened the workflow it begins with, which would then take the place of ours. */
export async function untilReady(page) {
  await page.waitForFunction(
    () => window.app?.extensionManager?.spinner === false && window.LiteGraph?.registered_node_types?.SaveImage,
    null,
    { timeout: 240_000 },
  )
}
