CREATE TABLE outbox_messages (
	xid xid8 DEFAULT pg_current_xact_id(), 
	position BIGINT GENERATED ALWAYS AS IDENTITY, 
	shard SMALLINT NOT NULL, 
	message_id UUID NOT NULL, 
	topic TEXT NOT NULL, 
	key BYTEA, 
	type TEXT NOT NULL, 
	kind VARCHAR(8) NOT NULL, 
	payload BYTEA NOT NULL, 
	headers BYTEA NOT NULL, 
	content_type TEXT NOT NULL, 
	schema_fingerprint TEXT, 
	occurred_at TIMESTAMP WITH TIME ZONE NOT NULL, 
	recorded_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL, 
	expires_at TIMESTAMP WITH TIME ZONE, 
	PRIMARY KEY (position)
);

CREATE INDEX outbox_messages_xid ON outbox_messages (xid);

COMMENT ON TABLE outbox_messages IS 'unpublished messages; a relay deletes what the broker acknowledged';

ALTER TABLE outbox_messages SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000);

CREATE TABLE outbox_waiting (
	id BIGINT GENERATED ALWAYS AS IDENTITY, 
	position BIGINT, 
	shard SMALLINT NOT NULL, 
	message_id UUID NOT NULL, 
	topic TEXT NOT NULL, 
	key BYTEA, 
	type TEXT NOT NULL, 
	kind VARCHAR(8) NOT NULL, 
	payload BYTEA NOT NULL, 
	headers BYTEA NOT NULL, 
	content_type TEXT NOT NULL, 
	schema_fingerprint TEXT, 
	occurred_at TIMESTAMP WITH TIME ZONE NOT NULL, 
	recorded_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL, 
	expires_at TIMESTAMP WITH TIME ZONE, 
	reason VARCHAR(16) NOT NULL, 
	due_at TIMESTAMP WITH TIME ZONE, 
	attempts INTEGER DEFAULT '0' NOT NULL, 
	error TEXT, 
	PRIMARY KEY (id)
);

CREATE INDEX outbox_waiting_due ON outbox_waiting (due_at);

CREATE INDEX outbox_waiting_key ON outbox_waiting (topic, key, position);

COMMENT ON TABLE outbox_waiting IS 'messages that wait: retry (a failed head), follower (behind one), scheduled';

CREATE TABLE outbox_stopped_keys (
	topic TEXT NOT NULL, 
	key BYTEA NOT NULL, 
	shard SMALLINT NOT NULL, 
	position BIGINT NOT NULL, 
	reason VARCHAR(16) NOT NULL, 
	attempts INTEGER DEFAULT '0' NOT NULL, 
	due_at TIMESTAMP WITH TIME ZONE, 
	request VARCHAR(8), 
	requested_by TEXT, 
	PRIMARY KEY (topic, key)
);

COMMENT ON TABLE outbox_stopped_keys IS 'keys whose order is held: retry (the head waits for its next try), parked (the head is dead)';

CREATE TABLE outbox_relays (
	id UUID NOT NULL, 
	host TEXT NOT NULL, 
	started_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL, 
	expires_at TIMESTAMP WITH TIME ZONE NOT NULL, 
	version TEXT NOT NULL, 
	PRIMARY KEY (id)
);

COMMENT ON TABLE outbox_relays IS 'leases; the id is the fencing token of one start of one relay';

CREATE TABLE outbox_shards (
	shard SMALLINT NOT NULL, 
	owner UUID, 
	PRIMARY KEY (shard)
);

COMMENT ON TABLE outbox_shards IS 'which relay reads which shard';

CREATE TABLE outbox_ledger (
	id BIGINT GENERATED ALWAYS AS IDENTITY, 
	relay UUID NOT NULL, 
	topic TEXT NOT NULL, 
	published_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL, 
	outcome VARCHAR(16) NOT NULL, 
	min_id UUID NOT NULL, 
	max_id UUID NOT NULL, 
	ids UUID[] NOT NULL, 
	partitions INTEGER[] NOT NULL, 
	offsets BIGINT[] NOT NULL, 
	PRIMARY KEY (id)
);

CREATE INDEX outbox_ledger_published ON outbox_ledger (published_at);

COMMENT ON TABLE outbox_ledger IS 'evidence: one row per batch that the broker acknowledged';

CREATE TABLE outbox_control (
	id BIGINT GENERATED ALWAYS AS IDENTITY, 
	scope VARCHAR(16) NOT NULL, 
	target TEXT NOT NULL, 
	reason TEXT NOT NULL, 
	set_by TEXT NOT NULL, 
	set_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL, 
	until TIMESTAMP WITH TIME ZONE, 
	PRIMARY KEY (id)
);

COMMENT ON TABLE outbox_control IS 'pauses and kill switches that operators set';

CREATE TABLE outbox_audit (
	id BIGINT GENERATED ALWAYS AS IDENTITY, 
	at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL, 
	who TEXT NOT NULL, 
	action TEXT NOT NULL, 
	target TEXT NOT NULL, 
	why TEXT DEFAULT '' NOT NULL, 
	PRIMARY KEY (id)
);

COMMENT ON TABLE outbox_audit IS 'who did what, append only';

CREATE TABLE inbox_messages (
	consumer TEXT NOT NULL, 
	source TEXT DEFAULT '' NOT NULL, 
	message_id TEXT NOT NULL, 
	content_hash BYTEA, 
	handled_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL, 
	outcome BYTEA, 
	PRIMARY KEY (consumer, source, message_id)
);

CREATE INDEX inbox_messages_handled ON inbox_messages (handled_at);

COMMENT ON TABLE inbox_messages IS 'messages whose effect is committed: a second one is a duplicate';

CREATE TABLE inbox_waiting (
	id BIGINT GENERATED ALWAYS AS IDENTITY, 
	consumer TEXT NOT NULL, 
	topic TEXT NOT NULL, 
	key BYTEA, 
	payload BYTEA, 
	headers BYTEA NOT NULL, 
	origin TEXT NOT NULL, 
	partition INTEGER NOT NULL, 
	"offset" BIGINT NOT NULL, 
	reason VARCHAR(16) NOT NULL, 
	due_at TIMESTAMP WITH TIME ZONE, 
	attempts INTEGER DEFAULT '0' NOT NULL, 
	error TEXT, 
	first_failed_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL, 
	PRIMARY KEY (id)
);

CREATE INDEX inbox_waiting_due ON inbox_waiting (consumer, due_at);

CREATE INDEX inbox_waiting_key ON inbox_waiting (consumer, topic, key, id);

COMMENT ON TABLE inbox_waiting IS 'deliveries that wait: retry (a failed head), follower (behind one)';

CREATE TABLE inbox_batches (
	id UUID NOT NULL, 
	consumer TEXT NOT NULL, 
	host TEXT NOT NULL, 
	expires_at TIMESTAMP WITH TIME ZONE NOT NULL, 
	messages JSON NOT NULL, 
	PRIMARY KEY (id)
);

CREATE INDEX inbox_batches_consumer ON inbox_batches (consumer, expires_at);

COMMENT ON TABLE inbox_batches IS 'what a consumer process is handling right now: finds the message that kills it';

CREATE TABLE dead_letters (
	id UUID NOT NULL, 
	side VARCHAR(8) NOT NULL, 
	consumer TEXT DEFAULT '' NOT NULL, 
	state VARCHAR(10) DEFAULT 'dead' NOT NULL, 
	generation INTEGER DEFAULT '0' NOT NULL, 
	parent_id UUID, 
	topic TEXT NOT NULL, 
	key BYTEA, 
	message_id TEXT NOT NULL, 
	source TEXT DEFAULT '' NOT NULL, 
	type TEXT NOT NULL, 
	kind VARCHAR(8) NOT NULL, 
	headers BYTEA NOT NULL, 
	payload BYTEA, 
	origin TEXT DEFAULT '' NOT NULL, 
	position BIGINT, 
	failure VARCHAR(16) NOT NULL, 
	stage VARCHAR(16) NOT NULL, 
	error_class TEXT NOT NULL, 
	error TEXT NOT NULL, 
	path TEXT DEFAULT '' NOT NULL, 
	byte_offset BIGINT, 
	attempts INTEGER NOT NULL, 
	first_failed_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL, 
	died_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL, 
	closed_at TIMESTAMP WITH TIME ZONE, 
	fingerprint VARCHAR(16) NOT NULL, 
	writer_schema TEXT DEFAULT '' NOT NULL, 
	reader_schema TEXT DEFAULT '' NOT NULL, 
	problems JSON, 
	PRIMARY KEY (id)
);

CREATE INDEX dead_letters_state ON dead_letters (state, died_at);

CREATE INDEX dead_letters_message ON dead_letters (message_id);

COMMENT ON TABLE dead_letters IS 'messages that could not be published or handled: understood, repaired and replayed from here';

CREATE TABLE outbox_schemas (
	fingerprint VARCHAR(64) NOT NULL, 
	role VARCHAR(8) NOT NULL, 
	consumer TEXT DEFAULT '' NOT NULL, 
	type TEXT NOT NULL, 
	text TEXT NOT NULL, 
	seen_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL, 
	PRIMARY KEY (fingerprint, role, consumer, type)
);

COMMENT ON TABLE outbox_schemas IS 'schemas that writers used and readers read with';

CREATE TABLE outbox_version (
	id SMALLINT NOT NULL, 
	version INTEGER NOT NULL, 
	shards SMALLINT NOT NULL, 
	PRIMARY KEY (id)
);

COMMENT ON TABLE outbox_version IS 'one row: the version of these tables and the number of shards';

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

-- The same envelope and the same checks as outboxkit.publish, for writers that bypass the ORM: raw SQL, triggers, other
-- languages. SECURITY INVOKER: who emits needs INSERT on outbox_messages and SELECT on outbox_version, nothing else.

CREATE OR REPLACE FUNCTION outboxkit_header(name text, value bytea) RETURNS bytea
LANGUAGE sql IMMUTABLE AS $$
    SELECT int2send(octet_length(convert_to(name, 'UTF8'))::int2) || int4send(octet_length(value))
        || convert_to(name, 'UTF8') || value
$$;

CREATE OR REPLACE FUNCTION outboxkit_emit(
    topic text,
    type text,
    payload jsonb,
    key text DEFAULT NULL,
    headers jsonb DEFAULT '{}',
    source text DEFAULT 'outboxkit',
    version integer DEFAULT 1,
    kind text DEFAULT 'event',
    correlation_id text DEFAULT ''
) RETURNS uuid
LANGUAGE plpgsql SECURITY INVOKER SET search_path FROM CURRENT AS $$
#variable_conflict use_column
DECLARE
    now_utc timestamptz := clock_timestamp();
    -- UUIDv7: 48 bits of milliseconds, then random; a random UUID is version 4, two bits make it 7
    id uuid := encode(set_bit(set_bit(overlay(
        uuid_send(gen_random_uuid())
        PLACING substring(int8send((extract(epoch FROM now_utc) * 1000)::bigint) FROM 3) FROM 1 FOR 6
    ), 52, 1), 53, 1), 'hex')::uuid;
    body bytea := convert_to(outboxkit_emit.payload::text, 'UTF8');
    raw_key bytea := convert_to(outboxkit_emit.key, 'UTF8');
    own record;
    own_count integer := 0;
    own_size integer := 0;
    extra bytea := '';
    packed bytea := '';
    count integer := 0;
    digest bytea;
    shards integer;
BEGIN
    IF outboxkit_emit.topic IS NULL OR outboxkit_emit.type IS NULL OR outboxkit_emit.payload IS NULL THEN
        RAISE EXCEPTION 'outboxkit_emit needs a topic, a type and a payload' USING ERRCODE = '22004';
    END IF;
    IF outboxkit_emit.kind NOT IN ('event', 'command') THEN
        RAISE EXCEPTION 'kind is event or command, not %', outboxkit_emit.kind USING ERRCODE = '22023';
    END IF;
    IF octet_length(body) > 900000 OR octet_length(raw_key) > 1024 THEN
        RAISE EXCEPTION '%: the payload is larger than 900000 bytes or the key than 1024', outboxkit_emit.type
            USING ERRCODE = '22001';
    END IF;
    FOR own IN SELECT pair.key AS name, convert_to(pair.value, 'UTF8') AS value
               FROM jsonb_each_text(outboxkit_emit.headers) AS pair LOOP
        IF own.name ~* '^(ce_|cloudevents:|cloudevents_|outboxkit-)' THEN
            RAISE EXCEPTION 'the header % is reserved; choose a name without that prefix', own.name
                USING ERRCODE = '22023';
        END IF;
        own_count := own_count + 1;
        own_size := own_size + octet_length(convert_to(own.name, 'UTF8')) + octet_length(own.value);
        extra := extra || outboxkit_header(own.name, own.value);
    END LOOP;
    IF own_count > 64 OR own_size > 16384 THEN
        RAISE EXCEPTION '%: more than 64 headers, or more than 16384 bytes of them', outboxkit_emit.type
            USING ERRCODE = '22001';
    END IF;
    FOR own IN SELECT pair.name, convert_to(pair.value, 'UTF8') AS value FROM (VALUES
        (1, 'ce_specversion', '1.0'),
        (2, 'ce_id', id::text),
        (3, 'ce_type', outboxkit_emit.type),
        (4, 'ce_source', outboxkit_emit.source),
        (5, 'ce_correlationid', NULLIF(outboxkit_emit.correlation_id, '')),
        (6, 'ce_dataschema', 'urn:outboxkit:' || outboxkit_emit.type || ':' || outboxkit_emit.version),
        (7, 'content-type', 'application/json'),
        (8, 'ce_time', to_char(now_utc AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')),
        (9, 'ce_partitionkey', outboxkit_emit.key)
    ) AS pair (place, name, value) WHERE pair.value IS NOT NULL ORDER BY place LOOP
        count := count + 1;
        packed := packed || outboxkit_header(own.name, own.value);
    END LOOP;
    SELECT v.shards INTO STRICT shards FROM outbox_version AS v;
    digest := sha256(convert_to(outboxkit_emit.topic, 'UTF8') || '\x00'::bytea || coalesce(raw_key, uuid_send(id)));
    INSERT INTO outbox_messages
        (shard, message_id, topic, key, type, kind, payload, headers, content_type, occurred_at)
    VALUES (
        (get_byte(digest, 0) * 256 + get_byte(digest, 1)) % shards, id, outboxkit_emit.topic, raw_key,
        outboxkit_emit.type, outboxkit_emit.kind, body,
        int2send((count + own_count)::int2) || packed || extra, 'application/json', now_utc
    );
    RETURN id;
END
$$;

-- CREATE TRIGGER capture AFTER INSERT OR UPDATE OR DELETE ON orders
--     FOR EACH ROW EXECUTE FUNCTION outboxkit_capture('orders', 'order', 'id');
-- Arguments: topic, the beginning of the type (order.created …), the columns of the ordering key, comma-separated.
CREATE OR REPLACE FUNCTION outboxkit_capture() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER SET search_path FROM CURRENT AS $$
DECLARE
    before jsonb := CASE WHEN TG_OP = 'INSERT' THEN '{}' ELSE to_jsonb(OLD) END;
    after jsonb := CASE WHEN TG_OP = 'DELETE' THEN '{}' ELSE to_jsonb(NEW) END;
    change text := CASE TG_OP WHEN 'INSERT' THEN 'created' WHEN 'UPDATE' THEN 'updated' ELSE 'deleted' END;
    present jsonb := CASE WHEN TG_OP = 'DELETE' THEN before ELSE after END;
    key_columns text[] := string_to_array(TG_ARGV[2], ',');
    changed text[];
    key text;
BEGIN
    SELECT coalesce(array_agg(name ORDER BY name), '{}') INTO changed
    FROM jsonb_object_keys(before || after) AS name
    WHERE before -> name IS DISTINCT FROM after -> name;
    IF changed = '{}' THEN
        RETURN NULL;
    END IF;
    SELECT string_agg(present ->> btrim(name), '/' ORDER BY place) INTO key
    FROM unnest(key_columns) WITH ORDINALITY AS columns (name, place);
    PERFORM outboxkit_emit(
        TG_ARGV[0],
        TG_ARGV[1] || '.' || change,
        jsonb_build_object(
            'change', change,
            'key', (SELECT jsonb_object_agg(btrim(name), present -> btrim(name)) FROM unnest(key_columns) AS name),
            'changed', to_jsonb(changed),
            'old', (SELECT coalesce(jsonb_object_agg(name, before -> name), '{}') FROM unnest(changed) AS name
                    WHERE before ? name),
            'new', (SELECT coalesce(jsonb_object_agg(name, after -> name), '{}') FROM unnest(changed) AS name
                    WHERE after ? name)
        ),
        key
    );
    RETURN NULL;
END
$$;
