-- Times are UTC by the database's clock. Names are stored normalised and folded, so that binary collation is right.

CREATE TABLE IF NOT EXISTS users (
  user_id VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  username VARCHAR(128) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
  display_name VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL DEFAULT '',
  email VARCHAR(320) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL DEFAULT '',
  is_super_user BOOLEAN NOT NULL DEFAULT FALSE,
  is_locked BOOLEAN NOT NULL DEFAULT FALSE,
  approval ENUM('pending', 'approved', 'rejected') CHARACTER SET ascii COLLATE ascii_bin NOT NULL DEFAULT 'approved',
  created_at DATETIME(6) NOT NULL,
  password_hash VARCHAR(512) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  password_set_at DATETIME(6) NOT NULL,
  password_expires_at DATETIME(6) NULL COMMENT 'NULL: never',
  must_change BOOLEAN NOT NULL DEFAULT FALSE,
  old_password_attempts INT UNSIGNED NOT NULL DEFAULT 0 COMMENT 'counted before each verification, 0 after a right one',
  old_password_attempts_since DATETIME(6) NULL COMMENT 'when the first of them was',
  PRIMARY KEY (user_id),
  UNIQUE KEY users_username (username)
) ENGINE = InnoDB;

CREATE TABLE IF NOT EXISTS sessions (
  session_id BIGINT UNSIGNED NOT NULL AUTO_INCREMENT,
  token_hash BINARY(32) NOT NULL COMMENT 'SHA-256 of the session token',
  user_id VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  app VARCHAR(128) CHARACTER SET ascii COLLATE ascii_bin NOT NULL COMMENT 'the application it was opened from',
  remote_addr VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  opened_at DATETIME(6) NOT NULL,
  expires_at DATETIME(6) NOT NULL,
  ended_at DATETIME(6) NULL,
  PRIMARY KEY (session_id),
  UNIQUE KEY sessions_token_hash (token_hash),
  -- Without ended_at: MySQL 9.7 does not check a foreign key while a column of its index is NULL
  KEY sessions_user (user_id, expires_at),
  KEY sessions_expiry (expires_at),
  CONSTRAINT sessions_user FOREIGN KEY (user_id) REFERENCES users (user_id)
) ENGINE = InnoDB;

CREATE TABLE IF NOT EXISTS audit_log (
  audit_id BIGINT UNSIGNED NOT NULL AUTO_INCREMENT,
  event_id BINARY(16) NOT NULL COMMENT 'random; tells after a lost reply whether this very record was committed',
  at DATETIME(6) NOT NULL,
  cid VARCHAR(128) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  action VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  outcome VARCHAR(16) CHARACTER SET ascii COLLATE ascii_bin NOT NULL COMMENT 'ok, validated or refused',
  reason VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL DEFAULT '' COMMENT 'why it was refused',
  actor_user_id VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NULL COMMENT 'NULL: an operator, or not known',
  target_user_id VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NULL,
  app VARCHAR(128) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  remote_addr VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  peer_addr VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NULL COMMENT 'where it differs from remote_addr',
  claimed_addr VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NULL COMMENT 'where it differs from remote_addr',
  request JSON NOT NULL COMMENT 'what was asked, beyond passwords',
  PRIMARY KEY (audit_id),
  KEY audit_log_cid (cid),
  KEY audit_log_target (target_user_id, at),
  KEY audit_log_actor (actor_user_id, at),
  KEY audit_log_at (at)
) ENGINE = InnoDB;

CREATE TABLE IF NOT EXISTS idempotency_records (
  user_id VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL COMMENT 'whose key it is: the caller''s',
  idempotency_key VARCHAR(128) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  request_mac BINARY(32) NOT NULL COMMENT 'HMAC-SHA-256 of the request, keyed with the session token',
  password_expires_at DATETIME(6) NULL COMMENT 'of the first outcome',
  sessions_ended INT UNSIGNED NOT NULL COMMENT 'of the first outcome',
  created_at DATETIME(6) NOT NULL,
  PRIMARY KEY (user_id, idempotency_key),
  KEY idempotency_records_created (created_at)
) ENGINE = InnoDB;

CREATE TABLE IF NOT EXISTS login_attempts (
  subject BINARY(32) NOT NULL COMMENT 'SHA-256 of the kind (account or address) and the name',
  attempts INT UNSIGNED NOT NULL,
  since DATETIME(6) NOT NULL,
  PRIMARY KEY (subject),
  KEY login_attempts_since (since)
) ENGINE = InnoDB;
