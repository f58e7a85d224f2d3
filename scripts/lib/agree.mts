/** Asks before something that cannot be missed. */
import { createInterface } from 'node:readline/promises'
import { exitCodes, interrupted, Problem } from './report.mts'

/** Before anything is done that leads to a question. @throws Problem (usage) when nobody could answer it */
export function needAnswer(question: string, isAgreed: boolean): void {
  if (!isAgreed && (!process.stdin.isTTY || !process.stdout.isTTY))
    throw new Problem(exitCodes.usage, `${question} needs an answer, and there is no terminal`, 'Add: --yes')
}

/** @throws Problem (usage) without a terminal; (interrupted) when the answer is not "yes", or there is none */
export async function agree(question: string, isAgreed: boolean): Promise<void> {
  needAnswer(question, isAgreed)
  if (isAgreed) return
  const terminal = createInterface({ input: process.stdin, output: process.stdout })
  try {
    const answer = await terminal.question(`${question}? Type "yes": `, { signal: interrupted })
    if (answer.trim() !== 'yes')
      throw new Problem(exitCodes.interrupted, 'the answer was not "yes"; nothing was changed')
  } catch (error) {
    // Ctrl-C, Ctrl-D.
    if (!(error instanceof Error) || error.name !== 'AbortError') throw error
    throw new Problem(exitCodes.interrupted, 'interrupted; nothing was changed')
  } finally {
    terminal.close()
  }
}
