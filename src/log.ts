import { isatty } from 'node:tty';
import { type DestinationStream, type Logger, pino } from 'pino';
import type { Config } from './config.ts';

export type { Logger } from 'pino';

const STANDARD_OUTPUT = 1;
const blotOut = () => '[redacted]';
const SECRETS: Readonly<Record<string, typeof blotOut>> = {
  password: blotOut,
  old_password: blotOut,
  new_password: blotOut,
  oldPassword: blotOut,
  newPassword: blotOut,
  ust: blotOut,
  idempotencyKey: blotOut,
};

/**
 * A logger of JSON lines, or of readable ones on a terminal. What it is given is the caller's duty: calls log the
 * fields of `rpc/` by name and never a message, so that no password or token can get here. The redaction below
 * is the second line.
 */
export function createLogger(
  config: Pick<Config, 'log_level' | 'log_format'>,
  destination?: DestinationStream,
): Logger {
  const pretty =
    destination === undefined &&
    (config.log_format === 'pretty' || (config.log_format === 'auto' && isatty(STANDARD_OUTPUT)));
  const options = {
    level: config.log_level,
    base: { pid: process.pid },
    timestamp: pino.stdTimeFunctions.isoTime,
    formatters: {
      level: (label: string) => ({ level: label }),
      log: withoutSecretsInside,
    },
    serializers: { ...SECRETS, err: serializeError },
  };
  if (pretty) {
    const target = { target: 'pino-pretty', options: { ignore: 'pid', translateTime: 'HH:MM:ss.l' } };
    return pino({ ...options, transport: target });
  }
  // At once: what waits in memory is lost with a kill, and would wait behind hashes for its turn on libuv's pool.
  return pino(options, destination ?? pino.destination({ dest: STANDARD_OUTPUT, sync: true }));
}

type Fields = Record<string, unknown>;

/**
 * Blots out what is secret by its name one level below, where serializers do not reach. pino's own redaction takes
 * each line apart by each of its paths, which was a third of all that a refusal allocated.
 */
function withoutSecretsInside(fields: Fields): Fields {
  let clean = fields;
  for (const [name, value] of Object.entries(fields)) {
    if (typeof value !== 'object' || value === null || value instanceof Error) continue;
    const secrets = Object.keys(value).filter((inside) => Object.hasOwn(SECRETS, inside));
    if (secrets.length === 0) continue;
    clean = { ...clean, [name]: { ...value, ...Object.fromEntries(secrets.map((key) => [key, blotOut()])) } };
  }
  return clean;
}

/** Of an error the fields that say what went wrong, and none that hold what was being worked on (`sql`, `request`). */
function serializeError(error: unknown): unknown {
  if (!(error instanceof Error)) return { type: typeof error };
  const { code, errno, sqlState } = error as { code?: unknown; errno?: unknown; sqlState?: unknown };
  return {
    type: error.name,
    message: error.message,
    code,
    errno,
    sqlState,
    stack: error.stack,
    ...(error.cause instanceof Error ? { cause: serializeError(error.cause) } : {}),
    ...(error instanceof AggregateError ? { errors: error.errors.map(serializeError) } : {}),
  };
}
