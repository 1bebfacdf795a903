import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { availableParallelism } from 'node:os';
import { describe, test } from 'node:test';
import { ConfigError, configKeys, loadConfig, parseNetwork } from '../../src/config.ts';
import { temporaryFiles } from './temporary_files.ts';

const file = temporaryFiles();
const required = { REKEY_APPS: 'CRM', REKEY_DATABASE_URL: 'mysql://user:word@db/rekey' };

const load = (environment: NodeJS.ProcessEnv, toml?: string) =>
  loadConfig(toml === undefined ? undefined : file('config.toml', toml), { ...required, ...environment });

function problemsOf(environment: NodeJS.ProcessEnv, toml?: string): readonly string[] {
  try {
    loadConfig(toml === undefined ? undefined : file('config.toml', toml), environment);
  } catch (error) {
    assert.ok(error instanceof ConfigError, String(error));
    for (const problem of error.problems) assert.ok(error.message.includes(problem));
    return error.problems;
  }
  return [];
}

const oneProblem = (environment: NodeJS.ProcessEnv, toml?: string): string => {
  const problems = problemsOf({ ...required, ...environment }, toml);
  assert.equal(problems.length, 1, problems.join('\n'));
  return problems[0] as string;
};

describe('what is wrong is told all at once', () => {
  test('a file with ten mistakes gives ten lines, each naming its key', () => {
    const problems = problemsOf(
      { REKEY_DATABASE_URL: 'mysql://user:word@db/rekey' },
      `
      listen = "nowhere"
      apps = []
      trusted_peers = ["10.0.0.0/33"]
      log_level = "loud"
      colour = "blue"
      [policy]
      min_length = "eight"
      max_lenght = 20
      [hash]
      iterations = 0
      [guard]
      window_seconds = 1.5
      [limits]
      message_bytes = true
      `,
    );
    const keys = [
      'apps (REKEY_APPS): ',
      'colour: ',
      'guard.window_seconds (REKEY_GUARD_WINDOW_SECONDS): ',
      'hash.iterations (REKEY_HASH_ITERATIONS): ',
      'limits.message_bytes (REKEY_LIMITS_MESSAGE_BYTES): ',
      'listen (REKEY_LISTEN): ',
      'log_level (REKEY_LOG_LEVEL): ',
      'policy.max_lenght: ',
      'policy.min_length (REKEY_POLICY_MIN_LENGTH): ',
      'trusted_peers (REKEY_TRUSTED_PEERS): ',
    ];
    const sorted = problems.toSorted();
    assert.equal(problems.length, keys.length, problems.join('\n'));
    for (const [index, key] of keys.entries()) assert.ok(sorted[index]?.startsWith(key), sorted[index]);
  });

  test('mistakes of single keys do not hide those between keys and in files', () => {
    const problems = problemsOf({
      REKEY_POLICY_MAX_LENGTH: '100',
      REKEY_POLICY_MIN_LENGTH: '101',
      REKEY_POLICY_MIN_COMPLEXITY: '5',
      REKEY_TLS_KEY_FILE: '/does/not/exist',
      REKEY_TLS_PLAINTEXT: 'yes',
      REKEY_HASH_PEPPER_KEY_ID: 'k9',
      REKEY_HASH_PEPPER_KEYS_FILE: '/does/not/exist/either',
      REKEY_HASH_MEMORY_KIB: '8',
      REKEY_HASH_PARALLELISM: '2',
      REKEY_POLICY_REJECT_FILE: '/nor/does/this',
      REKEY_NO_SUCH_KEY: '1',
    });
    for (const key of [
      'apps',
      'database.url',
      'policy.min_length',
      'policy.min_complexity',
      'tls.certificate_file',
      'tls.key_file',
      'tls.plaintext',
      'hash.pepper_key_id',
      'hash.pepper_keys_file',
      'hash.memory_kib',
      'policy.reject_file',
      'REKEY_NO_SUCH_KEY',
    ]) {
      assert.ok(
        problems.some((problem) => problem.startsWith(key)),
        `${key} is missing from:\n${problems.join('\n')}`,
      );
    }
    assert.equal(new Set(problems).size, problems.length);
  });

  test('nothing at all asks for what is required and for nothing else', () => {
    assert.deepEqual(
      problemsOf({}).map((problem) => problem.split(' ')[0]),
      ['apps', 'database.url'],
    );
  });

  test('a section that is no table is named', () => {
    assert.match(oneProblem({}, 'policy = 3'), /^policy: /);
  });
});

describe('the file and the environment', () => {
  test('the environment wins over the file, key by key', () => {
    const toml = 'log_level = "warn"\n[policy]\nmin_length = 9\nmax_length = 90';
    const { log_level, policy } = load({ REKEY_POLICY_MIN_LENGTH: '10' }, toml);
    assert.deepEqual([log_level, policy.min_length, policy.max_length], ['warn', 10, 90]);
  });

  test('every key can be given as a variable', () => {
    const sample: Record<string, string> = {
      string: 'x',
      boolean: 'maybe',
      number: 'many',
      array: ',',
      enum: '?',
      union: '?',
    };
    for (const key of configKeys.keys()) {
      const variable = `REKEY_${key.toUpperCase().replaceAll('.', '_')}`;
      for (const value of Object.values(sample)) {
        assert.ok(
          !problemsOf({ ...required, [variable]: value }).includes(`${variable}: no such key`),
          variable,
        );
      }
    }
  });

  test('lists are comma-separated, and blanks around their entries do not count', () => {
    const { apps, trusted_peers } = load({
      REKEY_APPS: ' CRM , ERP,Shop,',
      REKEY_TRUSTED_PEERS: '10.0.0.0/8,::1',
    });
    assert.deepEqual(apps, ['CRM', 'ERP', 'Shop']);
    assert.deepEqual(trusted_peers, ['10.0.0.0/8', '::1']);
  });

  test('an empty list from the environment replaces the one in the file', () => {
    assert.deepEqual(load({ REKEY_POLICY_REJECT: '' }, '[policy]\nreject = ["acme"]').policy.reject, []);
  });

  test('numbers and flags are taken as such and nothing else is taken for one', () => {
    assert.equal(load({ REKEY_POLICY_EXPIRY_DAYS: '0' }).policy.expiry_days, 0);
    assert.equal(load({ REKEY_REFLECTION: 'false' }).reflection, false);
    for (const value of ['', ' ', '1e3', '0x10', '8.5', '١٢', '-1', 'NaN']) {
      assert.match(oneProblem({ REKEY_POLICY_EXPIRY_DAYS: value }), /^policy\.expiry_days /);
    }
    for (const value of ['', '1', 'yes', 'TRUE']) {
      assert.match(oneProblem({ REKEY_REFLECTION: value }), /must be true or false$/);
    }
  });

  test('a variable with the prefix that is no key is a mistake; those of the tools are not', () => {
    assert.equal(oneProblem({ REKEY_POLICY_MINLENGTH: '8' }), 'REKEY_POLICY_MINLENGTH: no such key');
    load({
      REKEY_CONFIG: 'x',
      REKEY_SERVER: 'x',
      REKEY_UST: 'x',
      REKEY_APP: 'x',
      REKEY_CA_FILE: 'x',
      REKEY_TEST_DATABASE: 'mysql',
      OTHER: 'x',
    });
  });

  test('a syntax error is told with its line', () => {
    assert.match(oneProblem({}, 'reflection = true\n\n[policy\nmin_length = 8\n'), /config\.toml, line 3: /);
  });

  test('a file that cannot be read is named', () => {
    assert.throws(
      () => loadConfig('/does/not/exist.toml', required),
      /\/does\/not\/exist\.toml: cannot be read \(ENOENT\)/,
    );
  });

  test('the configuration cannot be written to', () => {
    assert.throws(() => Object.assign(load({}), { reflection: false }), TypeError);
  });

  test('as many slots as cores and one more are the default', () => {
    assert.equal(load({}).slots, availableParallelism() + 1);
    assert.equal(load({ REKEY_HASH_SLOTS: '7' }).slots, 7);
  });
});

describe('secrets', () => {
  test('no mistake repeats a value', () => {
    const canary = 'cAnArY-7f3a';
    const base64 = Buffer.from(`${canary}${canary}`).toString('base64');
    const pepperFile = file('peppers', `${canary}\nk1:${base64}\nk1:${base64}\n${base64}:${canary}\n`);
    const problems = [
      ...problemsOf({
        REKEY_DATABASE_URL: `mysql:/${canary}@host`,
        REKEY_HASH_PEPPER_KEYS: `${canary},k1:${canary}`,
        REKEY_HASH_PEPPER_KEYS_FILE: pepperFile,
        REKEY_LOG_LEVEL: canary,
        REKEY_LISTEN: canary,
        REKEY_HASH_ENGINE: canary,
      }),
      ...problemsOf({ ...required, REKEY_HASH_PEPPER_KEYS_FILE: pepperFile }),
      ...problemsOf(required, `[database]\nurl = "mysql://user:${canary}@host/x\n[hash]\npepper_keys = 1`),
      ...problemsOf(required, `[database]\nurl = ["${canary}"]\n[hash]\npepper_keys = "k1:${canary}"`),
    ];
    assert.ok(problems.length >= 10, problems.join('\n'));
    for (const problem of problems) {
      assert.ok(!problem.includes(canary) && !problem.includes(base64), problem);
    }
  });
});

describe('the database', () => {
  test('its URL must name a host and a database, in a form that can be taken apart', () => {
    for (const url of [
      '',
      'db/rekey',
      'postgres://u:p@db/rekey',
      'mysql://u:p@db',
      'mysql://u:p@db/',
      'mysql://u:p%zz@db/rekey',
      'mysql://%ff:p@db/rekey',
      'mysql://u:p@db/%c0',
    ]) {
      assert.match(oneProblem({ REKEY_DATABASE_URL: url }), /^database\.url .*must be mysql:/, url);
    }
    for (const url of [
      'mysql://u:p@db/rekey',
      'mysql://u@[::1]:3307/rekey',
      'mysql://u:p%40%2F%C3%A9@10.0.0.1:1/x',
    ]) {
      assert.equal(load({ REKEY_DATABASE_URL: url }).database.url, url);
    }
  });

  test('options in its URL, which nothing would heed, are refused', () => {
    assert.match(oneProblem({ REKEY_DATABASE_URL: 'mysql://u:p@db/rekey?ssl=true' }), /^database\.url /);
  });
});

describe('addresses', () => {
  test('plaintext is refused off loopback, unless it is asked for', () => {
    for (const listen of ['0.0.0.0:50051', '[::]:50051', '10.1.2.3:1', 'example.org:50051', '128.0.0.1:1']) {
      assert.match(oneProblem({ REKEY_LISTEN: listen }), /^listen .*unencrypted/);
      assert.equal(load({ REKEY_LISTEN: listen, REKEY_TLS_PLAINTEXT: 'true' }).listen, listen);
    }
    for (const listen of ['127.0.0.1:0', '127.9.9.9:1', 'localhost:50051', '[::1]:50051']) {
      assert.equal(load({ REKEY_LISTEN: listen }).listen, listen);
    }
  });

  test('a certificate allows any address', () => {
    const certificate = file('certificate.pem', 'certificate');
    const key = file('key.pem', 'key');
    const { tlsFiles } = load({
      REKEY_LISTEN: '0.0.0.0:50051',
      REKEY_TLS_CERTIFICATE_FILE: certificate,
      REKEY_TLS_KEY_FILE: key,
      REKEY_TLS_CLIENT_CA_FILE: certificate,
    });
    assert.equal(tlsFiles?.certificate.toString(), 'certificate');
    assert.equal(tlsFiles?.key.toString(), 'key');
    assert.equal(tlsFiles?.clientCa?.toString(), 'certificate');
  });

  test('half of a TLS configuration is a mistake', () => {
    const certificate = file('certificate.pem', 'certificate');
    assert.match(oneProblem({ REKEY_TLS_CERTIFICATE_FILE: certificate }), /^tls\.key_file /);
    assert.match(oneProblem({ REKEY_TLS_KEY_FILE: certificate }), /^tls\.certificate_file /);
    assert.match(oneProblem({ REKEY_TLS_CLIENT_CA_FILE: certificate }), /^tls\.client_ca_file /);
  });

  test('a file that a key names and nobody can read is told with the key', () => {
    assert.match(
      oneProblem({ REKEY_DATABASE_CA_FILE: '/does/not/exist' }),
      /^database\.ca_file \(REKEY_DATABASE_CA_FILE\): cannot read .*ENOENT/,
    );
  });

  test('listen must be host:port', () => {
    for (const listen of ['', '50051', 'host', 'host:', 'host:65536', '::1:50051', 'a b:1', 'host:-1']) {
      assert.match(oneProblem({ REKEY_LISTEN: listen, REKEY_TLS_PLAINTEXT: 'true' }), /must be host:port$/);
    }
    assert.equal(load({ REKEY_METRICS_LISTEN: '127.0.0.1:9090' }).metrics_listen, '127.0.0.1:9090');
  });

  test('networks are addresses of one family with a prefix that fits', () => {
    assert.deepEqual(parseNetwork('10.0.0.0/8'), { address: '10.0.0.0', prefix: 8, family: 'ipv4' });
    assert.deepEqual(parseNetwork('192.0.2.7'), { address: '192.0.2.7', prefix: 32, family: 'ipv4' });
    assert.deepEqual(parseNetwork('2001:db8::/32'), { address: '2001:db8::', prefix: 32, family: 'ipv6' });
    assert.deepEqual(parseNetwork('::/0'), { address: '::', prefix: 0, family: 'ipv6' });
    for (const network of ['', '10.0.0.0/33', '10.0.0/8', '::/129', '10.0.0.0/8/8', '10.0.0.0/', 'host/8']) {
      assert.equal(parseNetwork(network), undefined, network);
    }
  });

  test('trusted peers become one list that knows both families', () => {
    const { trustedPeers } = load({ REKEY_TRUSTED_PEERS: '10.0.0.0/8,2001:db8::/32,192.0.2.7' });
    assert.ok(trustedPeers.check('10.255.0.1', 'ipv4'));
    assert.ok(trustedPeers.check('192.0.2.7', 'ipv4'));
    assert.ok(trustedPeers.check('2001:db8:1::5', 'ipv6'));
    assert.ok(!trustedPeers.check('192.0.2.8', 'ipv4'));
    assert.ok(!trustedPeers.check('2001:db9::1', 'ipv6'));
  });
});

describe('hashing', () => {
  const secret = randomBytes(32);
  const key = (id: string) => `${id}:${secret.toString('base64')}`;

  test('peppers come from the key and from the file', () => {
    const config = load({
      REKEY_HASH_PEPPER_KEYS: `${key('k1')},k2:${secret.toString('base64url')}`,
      REKEY_HASH_PEPPER_KEYS_FILE: file('peppers', `# old ones\n\n${key('k0')}\r\n`),
      REKEY_HASH_PEPPER_KEY_ID: 'k2',
    });
    assert.deepEqual([...config.peppers.keys()], ['k1', 'k2', 'k0']);
    for (const pepper of config.peppers.values()) assert.deepEqual(pepper, secret);
  });

  test('a pepper that is malformed, short or there twice is refused', () => {
    for (const keys of [
      'k1',
      'k1:',
      ':c2VjcmV0c2VjcmV0c2VjcmV0',
      'k1:c2hvcnQ=',
      'k 1:c2VjcmV0c2VjcmV0c2VjcmV0',
      'k1:c2Vjc*V0c2VjcmV0c2VjcmV0',
    ]) {
      assert.match(oneProblem({ REKEY_HASH_PEPPER_KEYS: keys }), /^hash\.pepper_keys /, keys);
      assert.match(
        oneProblem({ REKEY_HASH_PEPPER_KEYS_FILE: file('peppers', keys) }),
        /^hash\.pepper_keys_file /,
      );
    }
    assert.match(
      oneProblem({ REKEY_HASH_PEPPER_KEYS: `${key('k1')},${key('k1')}` }),
      /k1 stands there twice$/,
    );
  });

  test('the pepper of new hashes must be one of the keys', () => {
    assert.match(
      oneProblem({ REKEY_HASH_PEPPER_KEYS: key('k1'), REKEY_HASH_PEPPER_KEY_ID: 'k2' }),
      /^hash\.pepper_key_id .*none of the pepper keys/,
    );
  });

  test('Argon2 needs eight blocks of memory for each lane', () => {
    const settings = { REKEY_HASH_MEMORY_KIB: '16', REKEY_HASH_PARALLELISM: '3' };
    assert.match(oneProblem(settings), /^hash\.memory_kib /);
    load({ ...settings, REKEY_HASH_MEMORY_KIB: '24' });
  });
});

describe('the policy', () => {
  test('the words of the list and of the file are put together', () => {
    const { rejectWords } = load({
      REKEY_POLICY_REJECT: 'acme',
      REKEY_POLICY_REJECT_FILE: file('words', '# ours\nrekey\n\n  \nzürich \r\n'),
    });
    assert.deepEqual(rejectWords, ['acme', 'rekey', 'zürich']);
  });

  test('the least length must not exceed the greatest', () => {
    assert.match(
      oneProblem({ REKEY_POLICY_MIN_LENGTH: '65', REKEY_POLICY_MAX_LENGTH: '64' }),
      /^policy\.min_length .*must not exceed max_length$/,
    );
    load({ REKEY_POLICY_MIN_LENGTH: '64', REKEY_POLICY_MAX_LENGTH: '64' });
  });
});
