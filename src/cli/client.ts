import { randomUUID } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { type Timestamp, timestampDate } from '@bufbuild/protobuf/wkt';
import { Code, ConnectError, createClient } from '@connectrpc/connect';
import { createGrpcTransport } from '@connectrpc/connect-node';
import { type Command, InvalidArgumentError } from 'commander';
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from '../../gen/google/rpc/error_details_pb.ts';
import { SessionService } from '../../gen/rekey/v1/session_service_pb.ts';
import { UserService } from '../../gen/rekey/v1/user_service_pb.ts';
import { CommandError, EXIT, printJson, printTable } from './context.ts';
import { newSecret, secretsFrom } from './secrets.ts';

const DEFAULT_SERVER = 'http://127.0.0.1:50051';
const CALL_TIMEOUT_MS = 15_000;
const TRIES = 5;

interface ClientOptions {
  server: string;
  caFile?: string;
  app?: string;
  cid?: string;
  remoteAddr?: string;
  json?: boolean;
}

interface ChangeOptions extends ClientOptions {
  userId?: string;
  withOldPassword?: boolean;
  passwordExpiry?: number;
  mustChange?: boolean;
  validateOnly?: boolean;
  passwordStdin?: boolean;
  idempotencyKey?: string;
}

/** The commands that are clients: they know the service by its stub and nothing of the server. */
export function addClientCommands(program: Command): void {
  client(
    program,
    'change-password',
    "change the own password or, as a super-user, somebody else's (session token: REKEY_UST)",
  )
    .option('--user-id <id>', 'whose password; default: the own one')
    .option('--with-old-password', "send the old password for somebody else's, too")
    .option('--password-expiry <days>', 'in how many days it expires (super-users)', wholeNumber)
    .option('--must-change', 'must be changed at the next log-in (super-users)')
    .option('--no-must-change', 'need not be changed at the next log-in (super-users)')
    .option('--validate-only', 'check everything, change nothing')
    .option(
      '--password-stdin',
      'read the passwords from standard input, a line each: old (where one is sent), new',
    )
    .option('--idempotency-key <key>', 'ID of this change, for another try later (default: a random one)')
    .action(changePassword);
  client(program, 'login <username>', 'open a session; prints its token (UST)')
    .option('--new-password', 'set a new password in the same step')
    .option(
      '--password-stdin',
      'read the passwords from standard input, a line each: current, new (where one is set)',
    )
    .action(login);
  client(program, 'logout', 'end the session (session token: REKEY_UST)').action(logout);
  client(program, 'whoami', 'show the session and its owner (session token: REKEY_UST)').action(whoami);
}

const wholeNumber = (value: string) => {
  if (!/^-?\d{1,9}$/.test(value)) throw new InvalidArgumentError('It must be a whole number.');
  return Number(value);
};

function client(program: Command, name: string, description: string): Command {
  return program
    .command(name)
    .description(description)
    .option(
      '--server <url>',
      'http://host:port or https://host:port (or REKEY_SERVER)',
      process.env.REKEY_SERVER ?? DEFAULT_SERVER,
    )
    .option('--ca-file <file>', 'certificate authority of an https server (or REKEY_CA_FILE)')
    .option('--app <app>', 'application that the call is made from (or REKEY_APP)')
    .option('--cid <cid>', 'correlation ID for the audit log (default: the server makes one)')
    .option('--remote-addr <address>', "the person's address, if this peer is trusted to tell it")
    .option('--json', 'print the answer, or the error, as JSON');
}

async function changePassword(options: ChangeOptions): Promise<void> {
  const secrets = secretsFrom(options.passwordStdin === true);
  const sendsOld = options.userId === undefined || options.withOldPassword === true;
  const request = {
    ...(sendsOld ? { oldPassword: await secrets.next('Old password') } : {}),
    newPassword: await newSecret(secrets, 'New password'),
    ...(options.userId === undefined ? {} : { userId: options.userId }),
    ...(options.passwordExpiry === undefined ? {} : { passwordExpiry: options.passwordExpiry }),
    ...(options.mustChange === undefined ? {} : { mustChange: options.mustChange }),
    ...(options.validateOnly === undefined ? {} : { validateOnly: options.validateOnly }),
  };
  const idempotencyKey = options.idempotencyKey ?? randomUUID();
  const users = createClient(UserService, transport(options));
  const { answer, cid } = await call(
    options,
    { ...sessionMetadata(), 'idempotency-key': idempotencyKey },
    (headers, onHeader) => users.changePassword(request, { headers, onHeader, timeoutMs: CALL_TIMEOUT_MS }),
  );
  const expires = isoTime(answer.passwordExpiryTime);
  if (options.json) {
    printJson({ cid, password_expiry_time: expires ?? null, sessions_ended: answer.sessionsEnded });
    return;
  }
  const others = `${answer.sessionsEnded} other ${answer.sessionsEnded === 1 ? 'session' : 'sessions'}`;
  process.stdout.write(
    options.validateOnly
      ? `It would be changed, expire ${expires ?? 'never'}, and end ${others}. Nothing was changed.\ncid: ${cid}\n`
      : `Changed. It expires ${expires ?? 'never'}; ${others} ended.\ncid: ${cid}\n`,
  );
}

async function login(
  username: string,
  options: ClientOptions & { newPassword?: boolean; passwordStdin?: boolean },
) {
  const secrets = secretsFrom(options.passwordStdin === true);
  const request = {
    username,
    password: await secrets.next(`Password of ${username}`),
    ...(options.newPassword ? { newPassword: await newSecret(secrets, 'New password') } : {}),
  };
  const sessions = createClient(SessionService, transport(options));
  const { answer, cid } = await call(options, {}, (headers, onHeader) =>
    sessions.login(request, { headers, onHeader, timeoutMs: CALL_TIMEOUT_MS }),
  );
  const passwordExpires = isoTime(answer.passwordExpiryTime);
  if (options.json) {
    printJson({
      cid,
      ust: answer.ust,
      expires_at: isoTime(answer.sessionExpiryTime),
      user_id: answer.userId,
      password_expiry_time: passwordExpires ?? null,
      password_about_to_expire: answer.passwordAboutToExpire,
    });
    return;
  }
  if (answer.passwordAboutToExpire)
    process.stderr.write(`The password expires ${passwordExpires}: change it before.\n`);
  process.stdout.write(`${answer.ust}\n`);
}

async function logout(options: ClientOptions): Promise<void> {
  const sessions = createClient(SessionService, transport(options));
  const { cid } = await call(options, sessionMetadata(), (headers, onHeader) =>
    sessions.logout({}, { headers, onHeader, timeoutMs: CALL_TIMEOUT_MS }),
  );
  if (options.json) printJson({ cid });
}

async function whoami(options: ClientOptions): Promise<void> {
  const sessions = createClient(SessionService, transport(options));
  const { answer, cid } = await call(options, sessionMetadata(), (headers, onHeader) =>
    sessions.getSession({}, { headers, onHeader, timeoutMs: CALL_TIMEOUT_MS }),
  );
  const found = {
    cid,
    user_id: answer.userId,
    username: answer.username,
    super_user: answer.superUser,
    session_expiry_time: isoTime(answer.sessionExpiryTime),
    password_expiry_time: isoTime(answer.passwordExpiryTime) ?? null,
    password_change_required: answer.passwordChangeRequired,
  };
  if (options.json) printJson(found);
  else
    printTable(
      ['KEY', 'VALUE'],
      Object.entries(found).map(([key, value]) => [key, String(value ?? 'never')]),
    );
}

const isoTime = (timestamp: Timestamp | undefined) => timestamp && timestampDate(timestamp).toISOString();

function sessionMetadata(): Record<string, string> {
  const ust = process.env.REKEY_UST;
  if (!ust)
    throw new CommandError(
      'Put the session token into REKEY_UST; "rekey session open" and "rekey login" print one.',
      EXIT.usage,
    );
  return { ust };
}

function transport(options: ClientOptions) {
  const caFile = options.caFile ?? process.env.REKEY_CA_FILE;
  return createGrpcTransport({
    baseUrl: /^https?:\/\//.test(options.server) ? options.server : `http://${options.server}`,
    ...(caFile === undefined ? {} : { nodeOptions: { ca: readFileSync(caFile) } }),
  });
}

/**
 * Makes a call, again and again where the error says that this is worth it: a change carries an idempotency key,
 * so that trying again is safe.
 */
async function call<T>(
  options: ClientOptions,
  metadata: Record<string, string>,
  send: (headers: Headers, onHeader: (headers: Headers) => void) => Promise<T>,
): Promise<{ answer: T; cid: string }> {
  const app = options.app ?? process.env.REKEY_APP;
  if (app === undefined) throw new CommandError('Name the application with --app or REKEY_APP.', EXIT.usage);
  const headers = new Headers({
    app,
    ...metadata,
    ...(options.cid === undefined ? {} : { cid: options.cid }),
    ...(options.remoteAddr === undefined ? {} : { 'remote-addr': options.remoteAddr }),
  });
  for (let attempt = 1; ; attempt++) {
    let cid = '';
    try {
      const answer = await send(headers, (received) => {
        cid = received.get('cid') ?? '';
      });
      return { answer, cid };
    } catch (caught) {
      const error = ConnectError.from(caught);
      const pauseMs = pauseBeforeRetry(error, attempt);
      if (attempt >= TRIES || pauseMs === undefined) throw new CallError(error, options);
      process.stderr.write(`${error.rawMessage}; trying again in ${(pauseMs / 1000).toFixed(1)} s\n`);
      await sleep(pauseMs);
    }
  }
}

const PAUSE_MAX_MS = 5_000;

/** @returns undefined where another try would bring nothing. */
function pauseBeforeRetry(error: ConnectError, attempt: number): number | undefined {
  const [info] = error.findDetails(ErrorInfoSchema);
  const isPassing = error.code === Code.Unavailable || info?.reason === 'OVERLOADED';
  const [retry] = error.findDetails(RetryInfoSchema);
  const wantedMs = retry?.retryDelay
    ? Number(retry.retryDelay.seconds) * 1000 + retry.retryDelay.nanos / 1e6
    : 200 * 2 ** attempt;
  return isPassing ? Math.min(PAUSE_MAX_MS, wantedMs) : undefined;
}

const TRY_AGAIN = new Set([Code.Unavailable, Code.ResourceExhausted, Code.DeadlineExceeded, Code.Aborted]);

/** A call's error, as a person wants to read it. */
class CallError extends CommandError {
  constructor(error: ConnectError, options: ClientOptions) {
    const [info] = error.findDetails(ErrorInfoSchema);
    const violations = error.findDetails(BadRequestSchema).flatMap((bad) => bad.fieldViolations);
    const [retry] = error.findDetails(RetryInfoSchema);
    const retrySeconds = retry?.retryDelay && Number(retry.retryDelay.seconds);
    const cid = info?.metadata.cid;
    const message = options.json
      ? JSON.stringify({
          code: Code[error.code],
          reason: info?.reason ?? null,
          message: error.rawMessage,
          cid: cid ?? null,
          metadata: info?.metadata ?? {},
          violations: violations.map(({ field, reason, description }) => ({ field, reason, description })),
          retry_after_seconds: retrySeconds ?? null,
        })
      : [
          info ? `${error.rawMessage} (${info.reason})` : `${options.server}: ${error.rawMessage}`,
          ...violations.map(({ field, reason, description }) => `  - ${field} ${description} (${reason})`),
          ...(retrySeconds === undefined ? [] : [`Try again in ${Math.max(1, retrySeconds)} s.`]),
          ...(cid === undefined ? [] : [`cid: ${cid}`]),
        ].join('\n');
    super(message, TRY_AGAIN.has(error.code) ? EXIT.tryAgain : EXIT.failed);
    this.name = 'CallError';
  }
}
