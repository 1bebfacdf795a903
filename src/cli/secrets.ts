import { createInterface } from 'node:readline';
import { CommandError, EXIT } from './context.ts';

/** Where a command gets its passwords: a terminal without echo, or standard input, a line each. Never arguments. */
export interface Secrets {
  next(what: string): Promise<string>;
}

export function secretsFrom(fromStdin: boolean): Secrets {
  return fromStdin ? linesOfStdin() : terminal;
}

const terminal: Secrets = {
  async next(what) {
    if (!process.stdin.isTTY) {
      throw new CommandError('There is no terminal to ask for a password; use --password-stdin.', EXIT.usage);
    }
    // Megabytes that no other command needs, and the server least of all.
    const { default: askPassword } = await import('@inquirer/password');
    // Prompts go to standard error, so that standard output stays the command's answer.
    return await askPassword({ message: what, mask: false }, { output: process.stderr });
  },
};

function linesOfStdin(): Secrets {
  const lines = createInterface({ input: process.stdin, crlfDelay: Number.POSITIVE_INFINITY })[
    Symbol.asyncIterator
  ]();
  return {
    async next(what) {
      const line = await lines.next();
      if (line.done)
        throw new CommandError(`Standard input ended where a line was wanted: ${what}`, EXIT.usage);
      return line.value;
    },
  };
}

/** A new password; on a terminal it is asked for twice. */
export async function newSecret(secrets: Secrets, what: string): Promise<string> {
  const first = await secrets.next(what);
  if (secrets === terminal && (await secrets.next(`${what} again`)) !== first) {
    throw new CommandError('The two are not the same; nothing was changed.', EXIT.usage);
  }
  return first;
}
