CREATE TABLE outbox_messages (
	xid INTEGER DEFAULT NULL, 
	position INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	shard SMALLINT NOT NULL, 
	message_id CHAR(32) NOT NULL, 
	topic TEXT NOT NULL, 
	"key" BLOB, 
	type TEXT NOT NULL, 
	kind VARCHAR(8) NOT NULL, 
	payload BLOB NOT NULL, 
	headers BLOB NOT NULL, 
	content_type TEXT NOT NULL, 
	schema_fingerprint TEXT, 
	occurred_at VARCHAR(32) NOT NULL, 
	recorded_at VARCHAR(32) DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now')) NOT NULL, 
	expires_at VARCHAR(32)
);

CREATE INDEX outbox_messages_xid ON outbox_messages (xid);

CREATE TABLE outbox_waiting (
	id INTEGER NOT NULL, 
	position BIGINT, 
	shard SMALLINT NOT NULL, 
	message_id CHAR(32) NOT NULL, 
	topic TEXT NOT NULL, 
	"key" BLOB, 
	type TEXT NOT NULL, 
	kind VARCHAR(8) NOT NULL, 
	payload BLOB NOT NULL, 
	headers BLOB NOT NULL, 
	content_type TEXT NOT NULL, 
	schema_fingerprint TEXT, 
	occurred_at VARCHAR(32) NOT NULL, 
	recorded_at VARCHAR(32) DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now')) NOT NULL, 
	expires_at VARCHAR(32), 
	reason VARCHAR(16) NOT NULL, 
	due_at VARCHAR(32), 
	attempts INTEGER DEFAULT '0' NOT NULL, 
	error TEXT, 
	PRIMARY KEY (id)
);

CREATE INDEX outbox_waiting_key ON outbox_waiting (topic, "key", position);

CREATE INDEX outbox_waiting_due ON outbox_waiting (due_at);

CREATE TABLE outbox_stopped_keys (
	topic TEXT NOT NULL, 
	"key" BLOB NOT NULL, 
	shard SMALLINT NOT NULL, 
	position BIGINT NOT NULL, 
	reason VARCHAR(16) NOT NULL, 
	attempts INTEGER DEFAULT '0' NOT NULL, 
	due_at VARCHAR(32), 
	request VARCHAR(8), 
	requested_by TEXT, 
	PRIMARY KEY (topic, "key")
);

CREATE TABLE outbox_relays (
	id CHAR(32) NOT NULL, 
	host TEXT NOT NULL, 
	started_at VARCHAR(32) DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now')) NOT NULL, 
	expires_at VARCHAR(32) NOT NULL, 
	version TEXT NOT NULL, 
	PRIMARY KEY (id)
);

CREATE TABLE outbox_shards (
	shard SMALLINT NOT NULL, 
	owner CHAR(32), 
	PRIMARY KEY (shard)
);

CREATE TABLE outbox_ledger (
	id INTEGER NOT NULL, 
	relay CHAR(32) NOT NULL, 
	topic TEXT NOT NULL, 
	published_at VARCHAR(32) DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now')) NOT NULL, 
	outcome VARCHAR(16) NOT NULL, 
	min_id CHAR(32) NOT NULL, 
	max_id CHAR(32) NOT NULL, 
	ids JSON NOT NULL, 
	partitions JSON NOT NULL, 
	offsets JSON NOT NULL, 
	PRIMARY KEY (id)
);

CREATE INDEX outbox_ledger_published ON outbox_ledger (published_at);

CREATE TABLE outbox_control (
	id INTEGER NOT NULL, 
	scope VARCHAR(16) NOT NULL, 
	target TEXT NOT NULL, 
	reason TEXT NOT NULL, 
	set_by TEXT NOT NULL, 
	set_at VARCHAR(32) DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now')) NOT NULL, 
	until VARCHAR(32), 
	PRIMARY KEY (id)
);

CREATE TABLE outbox_audit (
	id INTEGER NOT NULL, 
	at VARCHAR(32) DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now')) NOT NULL, 
	who TEXT NOT NULL, 
	action TEXT NOT NULL, 
	target TEXT NOT NULL, 
	why TEXT DEFAULT '' NOT NULL, 
	PRIMARY KEY (id)
);

CREATE TABLE inbox_messages (
	consumer TEXT NOT NULL, 
	source TEXT DEFAULT '' NOT NULL, 
	message_id TEXT NOT NULL, 
	content_hash BLOB, 
	handled_at VARCHAR(32) DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now')) NOT NULL, 
	outcome BLOB, 
	PRIMARY KEY (consumer, source, message_id)
);

CREATE INDEX inbox_messages_handled ON inbox_messages (handled_at);

CREATE TABLE inbox_waiting (
	id INTEGER NOT NULL, 
	consumer TEXT NOT NULL, 
	topic TEXT NOT NULL, 
	"key" BLOB, 
	payload BLOB, 
	headers BLOB NOT NULL, 
	origin TEXT NOT NULL, 
	partition INTEGER NOT NULL, 
	"offset" BIGINT NOT NULL, 
	reason VARCHAR(16) NOT NULL, 
	due_at VARCHAR(32), 
	attempts INTEGER DEFAULT '0' NOT NULL, 
	error TEXT, 
	first_failed_at VARCHAR(32) DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now')) NOT NULL, 
	PRIMARY KEY (id)
);

CREATE INDEX inbox_waiting_key ON inbox_waiting (consumer, topic, "key", id);

CREATE INDEX inbox_waiting_due ON inbox_waiting (consumer, due_at);

CREATE TABLE inbox_batches (
	id CHAR(32) NOT NULL, 
	consumer TEXT NOT NULL, 
	host TEXT NOT NULL, 
	expires_at VARCHAR(32) NOT NULL, 
	messages JSON NOT NULL, 
	PRIMARY KEY (id)
);

CREATE INDEX inbox_batches_consumer ON inbox_batches (consumer, expires_at);

CREATE TABLE dead_letters (
	id CHAR(32) NOT NULL, 
	side VARCHAR(8) NOT NULL, 
	consumer TEXT DEFAULT '' NOT NULL, 
	state VARCHAR(10) DEFAULT 'dead' NOT NULL, 
	generation INTEGER DEFAULT '0' NOT NULL, 
	parent_id CHAR(32), 
	topic TEXT NOT NULL, 
	"key" BLOB, 
	message_id TEXT NOT NULL, 
	source TEXT DEFAULT '' NOT NULL, 
	type TEXT NOT NULL, 
	kind VARCHAR(8) NOT NULL, 
	headers BLOB NOT NULL, 
	payload BLOB, 
	origin TEXT DEFAULT '' NOT NULL, 
	position BIGINT, 
	failure VARCHAR(16) NOT NULL, 
	stage VARCHAR(16) NOT NULL, 
	error_class TEXT NOT NULL, 
	error TEXT NOT NULL, 
	path TEXT DEFAULT '' NOT NULL, 
	byte_offset BIGINT, 
	attempts INTEGER NOT NULL, 
	first_failed_at VARCHAR(32) DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now')) NOT NULL, 
	died_at VARCHAR(32) DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now')) NOT NULL, 
	closed_at VARCHAR(32), 
	fingerprint VARCHAR(16) NOT NULL, 
	writer_schema TEXT DEFAULT '' NOT NULL, 
	reader_schema TEXT DEFAULT '' NOT NULL, 
	problems JSON, 
	PRIMARY KEY (id)
);

CREATE INDEX dead_letters_message ON dead_letters (message_id);

CREATE INDEX dead_letters_state ON dead_letters (state, died_at);

CREATE TABLE outbox_schemas (
	fingerprint VARCHAR(64) NOT NULL, 
	role VARCHAR(8) NOT NULL, 
	consumer TEXT DEFAULT '' NOT NULL, 
	type TEXT NOT NULL, 
	text TEXT NOT NULL, 
	seen_at VARCHAR(32) DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now')) NOT NULL, 
	PRIMARY KEY (fingerprint, role, consumer, type)
);

CREATE TABLE outbox_version (
	id SMALLINT NOT NULL, 
	version INTEGER NOT NULL, 
	shards SMALLINT NOT NULL, 
	PRIMARY KEY (id)
);

INSERT INTO outbox_version (id, version, shards) VALUES (1, 1, 64);

INSERT INTO outbox_shards (shard) VALUES (0);

INSERT INTO outbox_shards (shard) VALUES (1);

INSERT INTO outbox_shards (shard) VALUES (2);

INSERT INTO outbox_shards (shard) VALUES (3);

INSERT INTO outbox_shards (shard) VALUES (4);

INSERT INTO outbox_shards (shard) VALUES (5);

INSERT INTO outbox_shards (shard) VALUES (6);

INSERT INTO outbox_shards (shard) VALUES (7);

INSERT INTO outbox_shards (shard) VALUES (8);

INSERT INTO outbox_shards (shard) VALUES (9);

INSERT INTO outbox_shards (shard) VALUES (10);

INSERT INTO outbox_shards (shard) VALUES (11);

INSERT INTO outbox_shards (shard) VALUES (12);

INSERT INTO outbox_shards (shard) VALUES (13);

INSERT INTO outbox_shards (shard) VALUES (14);

INSERT INTO outbox_shards (shard) VALUES (15);

INSERT INTO outbox_shards (shard) VALUES (16);

INSERT INTO outbox_shards (shard) VALUES (17);

INSERT INTO outbox_shards (shard) VALUES (18);

INSERT INTO outbox_shards (shard) VALUES (19);

INSERT INTO outbox_shards (shard) VALUES (20);

INSERT INTO outbox_shards (shard) VALUES (21);

INSERT INTO outbox_shards (shard) VALUES (22);

INSERT INTO outbox_shards (shard) VALUES (23);

INSERT INTO outbox_shards (shard) VALUES (24);

INSERT INTO outbox_shards (shard) VALUES (25);

INSERT INTO outbox_shards (shard) VALUES (26);

INSERT INTO outbox_shards (shard) VALUES (27);

INSERT INTO outbox_shards (shard) VALUES (28);

INSERT INTO outbox_shards (shard) VALUES (29);

INSERT INTO outbox_shards (shard) VALUES (30);

INSERT INTO outbox_shards (shard) VALUES (31);

INSERT INTO outbox_shards (shard) VALUES (32);

INSERT INTO outbox_shards (shard) VALUES (33);

INSERT INTO outbox_shards (shard) VALUES (34);

INSERT INTO outbox_shards (shard) VALUES (35);

INSERT INTO outbox_shards (shard) VALUES (36);

INSERT INTO outbox_shards (shard) VALUES (37);

INSERT INTO outbox_shards (shard) VALUES (38);

INSERT INTO outbox_shards (shard) VALUES (39);

INSERT INTO outbox_shards (shard) VALUES (40);

INSERT INTO outbox_shards (shard) VALUES (41);

INSERT INTO outbox_shards (shard) VALUES (42);

INSERT INTO outbox_shards (shard) VALUES (43);

INSERT INTO outbox_shards (shard) VALUES (44);

INSERT INTO outbox_shards (shard) VALUES (45);

INSERT INTO outbox_shards (shard) VALUES (46);

INSERT INTO outbox_shards (shard) VALUES (47);

INSERT INTO outbox_shards (shard) VALUES (48);

INSERT INTO outbox_shards (shard) VALUES (49);

INSERT INTO outbox_shards (shard) VALUES (50);

INSERT INTO outbox_shards (shard) VALUES (51);

INSERT INTO outbox_shards (shard) VALUES (52);

INSERT INTO outbox_shards (shard) VALUES (53);

INSERT INTO outbox_shards (shard) VALUES (54);

INSERT INTO outbox_shards (shard) VALUES (55);

INSERT INTO outbox_shards (shard) VALUES (56);

INSERT INTO outbox_shards (shard) VALUES (57);

INSERT INTO outbox_shards (shard) VALUES (58);

INSERT INTO outbox_shards (shard) VALUES (59);

INSERT INTO outbox_shards (shard) VALUES (60);

INSERT INTO outbox_shards (shard) VALUES (61);

INSERT INTO outbox_shards (shard) VALUES (62);

INSERT INTO outbox_shards (shard) VALUES (63);
