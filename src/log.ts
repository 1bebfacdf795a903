import { type DestinationStream, type Logger, pino } from 'pino';
import type { Config } from './config.ts';

export type { Logger } from 'pino';

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
    (config.log_format === 'pretty' || (config.log_format === 'auto' && process.stdout.isTTY === true));
  return pino(
    {
      level: config.log_level,
      base: { pid: process.pid },
      timestamp: pino.stdTimeFunctions.isoTime,
      formatters: { level: (label) => ({ level: label }) },
      serializers: { err: serializeError },
      redact: {
        paths: [
          'password',
          'old_password',
          'new_password',
          'oldPassword',
          'newPassword',
          'ust',
          'idempotencyKey',
        ].flatMap((name) => [name, `*.${name}`]),
        censor: '[redacted]',
      },
      ...(pretty
        ? { transport: { target: 'pino-pretty', options: { ignore: 'pid', translateTime: 'HH:MM:ss.l' } } }
        : {}),
    },
    destination as DestinationStream,
  );
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
