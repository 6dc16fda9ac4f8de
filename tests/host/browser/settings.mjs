// Sets what a person sets in the host's settings, and opens the page anew, for some of it is read only then.

import { untilReady } from './page.mjs'

export async function reopen(page, settings) {
  await page.evaluate(async (settings) => {
    for (const [id, value] of Object.entries(settings)) await app.extensionManager.setting.set(id, value)
  }, settings)
  await page.reload({ waitUntil: 'domcontentloaded' })
  await untilReady(page)
}
