/**
 * A Rekey to try out: a private database, a person, a super-user, their sessions, and a server, all gone with
 * Ctrl-C. With REKEY_DATABASE_URL set, that server is used, in a database of the demo's own.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { createServer } from 'node:net';
import { fileURLToPath } from 'node:url';
import { credentials, makeGenericClientConstructor } from '@grpc/grpc-js';
import { service as healthService } from 'grpc-health-check';
import { createTestDatabase, freePort } from './private_database.ts';

const MAIN = fileURLToPath(new URL('../../src/main.ts', import.meta.url));
const say = (text: string) => process.stderr.write(`${text}\n`);

say('Bringing up a private database (the first time this downloads one; REKEY_DATABASE_URL names another) …');
const database = await createTestDatabase();
const port = process.env.REKEY_LISTEN?.split(':').at(-1) ?? String(await preferredPort(50051));
const environment = {
  ...process.env,
  REKEY_DATABASE_URL: database.url,
  REKEY_LISTEN: `127.0.0.1:${port}`,
  REKEY_APPS: process.env.REKEY_APPS ?? 'CRM,ERP',
};
const [app = 'CRM'] = environment.REKEY_APPS.split(',');

try {
  say('Making the tables, a person and a super-user …');
  await rekey(['migrate']);
  const alicePassword = 'violet kettle orbit 42';
  const carolPassword = 'granite teapot sunrise 7';
  const alice = await rekeyJson(['user', 'create', 'alice', '--email', 'alice@example.com'], alicePassword);
  await rekeyJson(['user', 'create', 'carol', '--super-user'], carolPassword);
  const aliceSession = await rekeyJson(['session', 'open', 'alice', '--app', app]);
  const carolSession = await rekeyJson(['session', 'open', 'carol', '--app', app]);

  // In a process group of its own: Ctrl-C in the terminal reaches it once, through `stop`, and not twice.
  const server = spawn(process.execPath, [MAIN, 'serve'], {
    env: environment,
    stdio: ['ignore', 'inherit', 'inherit'],
    detached: true,
  });
  const stop = () => server.kill('SIGTERM');
  process.once('SIGINT', stop);
  process.once('SIGTERM', stop);
  const ended = once(server, 'exit');
  await Promise.race([serving(), ended]);

  if (server.exitCode === null) {
    const url = `http://127.0.0.1:${port}`;
    const elsewhere = port === '50051' ? '' : ` --server ${url}`;
    say(`
Rekey serves on 127.0.0.1:${port}. In another terminal, in this folder:

  alice changes her own password (her old one is: ${alicePassword})

    REKEY_UST=${aliceSession.ust} npm run -s rekey -- change-password --app ${app}${elsewhere}

  carol, a super-user, sets alice's, which she must change at her next log-in

    REKEY_UST=${carolSession.ust} npm run -s rekey -- change-password --app ${app}${elsewhere} --user-id ${alice.user_id} --must-change

  alice logs in, and changes it in the same step

    npm run -s rekey -- login alice --app ${app}${elsewhere} --new-password

  the same call as other languages make it, through reflection (grpcurl works alike)

    npx buf curl --protocol grpc --http2-prior-knowledge \\
      -H 'ust: ${carolSession.ust}' -H 'app: ${app}' -H 'cid: demo-1' \\
      -d '{"user_id": "${alice.user_id}", "new_password": "copper lantern meadow 9"}' \\
      ${url}/rekey.v1.UserService/ChangePassword

  what happened

    REKEY_DATABASE_URL='${database.url}' REKEY_APPS=${environment.REKEY_APPS} npm run -s rekey -- audit list

Ctrl-C stops all of it.
`);
  }
  await ended;
} finally {
  await database.drop();
}
process.exit(0);

async function rekey(parameters: string[], input = ''): Promise<string> {
  const child = spawn(process.execPath, [MAIN, ...parameters], {
    env: environment,
    stdio: ['pipe', 'pipe', 'inherit'],
  });
  child.stdin.end(input);
  let output = '';
  child.stdout.on('data', (chunk) => {
    output += chunk;
  });
  const [code] = await once(child, 'close');
  if (code !== 0) throw new Error(`rekey ${parameters.join(' ')} ended with ${code}`);
  return output;
}

async function rekeyJson(parameters: string[], password?: string): Promise<Record<string, string>> {
  const fromStdin = password === undefined ? [] : ['--password-stdin'];
  return JSON.parse(await rekey([...parameters, '--json', ...fromStdin], password));
}

/** Rekey's own port where it is free, so that the commands are short; any other otherwise. */
async function preferredPort(wanted: number): Promise<number> {
  const probe = createServer();
  const isFree = await new Promise<boolean>((resolve) => {
    probe.once('error', () => resolve(false));
    probe.listen(wanted, '127.0.0.1', () => resolve(true));
  });
  if (!isFree) return await freePort();
  await new Promise((resolve) => probe.close(resolve));
  return wanted;
}

/** Resolves when the server's health says SERVING. */
async function serving(): Promise<void> {
  const Health = makeGenericClientConstructor(healthService, 'grpc.health.v1.Health');
  const health = new Health(`127.0.0.1:${port}`, credentials.createInsecure());
  try {
    for (;;) {
      const status = await new Promise<string | undefined>((resolve) =>
        health.check?.({ service: '' }, (_error: unknown, answer?: { status: string }) =>
          resolve(answer?.status),
        ),
      );
      if (status === 'SERVING') return;
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
  } finally {
    health.close();
  }
}
