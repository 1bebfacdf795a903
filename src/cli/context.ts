import { randomUUID } from 'node:crypto';
import { Wait } from '../call.ts';
import { type Config, loadConfig } from '../config.ts';
import type { AuditedCall } from '../mysql/audit.ts';
import { Database } from '../mysql/pool.ts';

/** Exit codes, as README documents them. */
export const EXIT = { ok: 0, failed: 1, usage: 2, tryAgain: 3 } as const;

/** A command cannot do what it was asked for, for a reason that one sentence tells. */
export class CommandError extends Error {
  readonly exitCode: number;
  constructor(message: string, exitCode: number = EXIT.failed) {
    super(message);
    this.name = 'CommandError';
    this.exitCode = exitCode;
  }
}

const OPERATION_TIMEOUT_MS = 30_000;

/** The operator's own application, in the audit log. */
const OPERATOR_APP = 'rekey-cli';

/** What an operator's command works with. */
export interface Operator {
  readonly config: Config;
  readonly database: Database;
  readonly wait: Wait;
  readonly call: AuditedCall;
}

export const configPath = (options: { config?: string }) => options.config ?? process.env.REKEY_CONFIG;

/** Runs an operator's command on the database, and closes that afterwards. */
export async function asOperator<T>(
  options: { config?: string; cid?: string },
  work: (operator: Operator) => Promise<T>,
): Promise<T> {
  const config = loadConfig(configPath(options), process.env);
  const database = new Database(config);
  const call = {
    cid: options.cid ?? randomUUID(),
    app: OPERATOR_APP,
    remoteAddress: 'local',
    peerAddress: 'local',
    claimedAddress: undefined,
  };
  try {
    return await work({ config, database, wait: Wait.forMs(OPERATION_TIMEOUT_MS), call });
  } finally {
    await database.close();
  }
}

export function printJson(value: unknown): void {
  process.stdout.write(`${JSON.stringify(value)}\n`);
}

/** Rows under their headings, each column as wide as it needs to be. */
export function printTable(headings: readonly string[], rows: readonly (readonly string[])[]): void {
  const widths = headings.map((heading, column) =>
    Math.max(heading.length, ...rows.map((row) => row[column]?.length ?? 0)),
  );
  for (const row of [headings, ...rows]) {
    process.stdout.write(
      `${row
        .map((cell, column) => cell.padEnd(widths[column] ?? 0))
        .join('  ')
        .trimEnd()}\n`,
    );
  }
}
