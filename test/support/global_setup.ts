/** One private server for a whole run: `node --test --test-global-setup=test/support/global_setup.ts`. */
import {
  type PrivateDatabase,
  sharedServerVariable,
  startPrivateDatabase,
  testDatabaseKind,
} from './private_database.ts';

let server: PrivateDatabase | undefined;

export async function globalSetup(): Promise<void> {
  if (process.env[sharedServerVariable] || process.env.REKEY_DATABASE_URL) return;
  server = await startPrivateDatabase({ kind: testDatabaseKind() });
  process.env[sharedServerVariable] = server.url();
}

export async function globalTeardown(): Promise<void> {
  await server?.dispose();
}
