/** Asks before something that cannot be missed. */
import { createInterface } from 'node:readline/promises'
import { exitCodes, interrupted, Problem } from './report.mts'

/** @throws Problem (usage) without a terminal, or when the answer is not "yes"; (interrupted) without an answer */
export async function agree(question: string, isAgreed: boolean): Promise<void> {
  if (isAgreed) return
  if (!process.stdin.isTTY || !process.stdout.isTTY)
    throw new Problem(exitCodes.usage, `${question} needs an answer, and there is no terminal`, 'Add: --yes')
  const terminal = createInterface({ input: process.stdin, output: process.stdout })
  try {
    const answer = await terminal.question(`${question}? Type "yes": `, { signal: interrupted })
    if (answer.trim() !== 'yes') throw new Problem(exitCodes.usage, 'nothing was changed')
  } catch (error) {
    // Ctrl-C, Ctrl-D.
    if (!(error instanceof Error) || error.name !== 'AbortError') throw error
    throw new Problem(exitCodes.interrupted, 'interrupted; nothing was changed')
  } finally {
    terminal.close()
  }
}
