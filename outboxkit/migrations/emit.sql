-- The same envelope and the same checks as outboxkit.publish, for writers that bypass the ORM: raw SQL, triggers, other
-- languages. SECURITY INVOKER: who emits needs INSERT on outbox_messages and SELECT on outbox_version, nothing else.

-- As outboxkit.message.pack_headers: text has no NUL, so the form that splits at NUL always serves.
CREATE OR REPLACE FUNCTION {at}outboxkit_header(name text, value bytea) RETURNS bytea
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT '\x00'::bytea || convert_to(name, 'UTF8') || '\x00'::bytea || value
$$;

CREATE OR REPLACE FUNCTION {at}outboxkit_emit(
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
LANGUAGE plpgsql SECURITY INVOKER SET search_path {path} AS $$
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
    digest bytea;
    shards integer;
BEGIN
    IF outboxkit_emit.topic IS NULL OR outboxkit_emit.type IS NULL OR outboxkit_emit.payload IS NULL THEN
        RAISE EXCEPTION 'outboxkit_emit needs a topic, a type and a payload' USING ERRCODE = '22004';
    END IF;
    IF outboxkit_emit.kind NOT IN ('event', 'command') THEN
        RAISE EXCEPTION 'kind is event or command, not %', outboxkit_emit.kind USING ERRCODE = '22023';
    END IF;
    IF outboxkit_emit.topic = '' OR octet_length(outboxkit_emit.topic) > 249 OR octet_length(outboxkit_emit.type) > 255 THEN
        RAISE EXCEPTION 'the topic has 1 to 249 bytes, the type at most 255; got % and %',
            octet_length(outboxkit_emit.topic), octet_length(outboxkit_emit.type) USING ERRCODE = '22001';
    END IF;
    IF octet_length(body) > 900000 OR octet_length(raw_key) > 1024 THEN
        RAISE EXCEPTION '%: the payload is larger than 900000 bytes or the key than 1024', outboxkit_emit.type
            USING ERRCODE = '22001';
    END IF;
    FOR own IN SELECT pair.key AS name, convert_to(pair.value, 'UTF8') AS value
               FROM jsonb_each_text(outboxkit_emit.headers) AS pair LOOP
        IF own.name ~* '^(ce_|cloudevents:|cloudevents_|outboxkit-|content-type$)' THEN
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
        packed := packed || outboxkit_header(own.name, own.value);
    END LOOP;
    SELECT v.shards INTO shards FROM outbox_version AS v;
    digest := sha256(convert_to(outboxkit_emit.topic, 'UTF8') || '\x00'::bytea || coalesce(raw_key, uuid_send(id)));
    INSERT INTO outbox_messages
        (shard, message_id, topic, key, type, kind, payload, headers, content_type, occurred_at)
    VALUES (
        (get_byte(digest, 0) * 256 + get_byte(digest, 1)) % coalesce(shards, 64), id,  -- as outboxkit.tables.SHARDS
        outboxkit_emit.topic, raw_key,
        outboxkit_emit.type, outboxkit_emit.kind, body,
        '\x01'::bytea || packed || extra, 'application/json', now_utc
    );
    RETURN id;
END
$$;

-- A value of a column as outboxkit's JSON has it: decimals as text with their digits, bytes in base64, durations as
-- P1DT2.000000S (a month has 30 days and a year 365, as for the driver). Arrays and domains are those of their items.
CREATE OR REPLACE FUNCTION {at}outboxkit_plain(value jsonb, kind oid) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path {path} AS $$
DECLARE
    base oid := outboxkit_plain.kind;
    found record;
    seconds numeric;
BEGIN
    IF value IS NULL OR value = 'null' THEN
        RETURN value;
    END IF;
    LOOP
        SELECT t.typtype, t.typcategory, t.typbasetype, t.typelem INTO found FROM pg_type AS t WHERE t.oid = base;
        EXIT WHEN found.typtype <> 'd';
        base := found.typbasetype;
    END LOOP;
    IF found.typcategory = 'A' AND jsonb_typeof(value) = 'array' THEN
        RETURN (
            SELECT coalesce(jsonb_agg(outboxkit_plain(
                item, CASE WHEN jsonb_typeof(item) = 'array' THEN base ELSE found.typelem END
            ) ORDER BY place), '[]')
            FROM jsonb_array_elements(value) WITH ORDINALITY AS items (item, place)
        );
    ELSIF base = 'numeric'::regtype THEN
        RETURN to_jsonb(value #>> '{}');
    ELSIF base = 'bytea'::regtype THEN
        RETURN to_jsonb(translate(encode((value #>> '{}')::bytea, 'base64'), E'\n', ''));
    ELSIF base = 'interval'::regtype THEN
        SELECT (date_part('year', i) * 365 + date_part('month', i) * 30 + date_part('day', i))::numeric * 86400
            + (date_part('hour', i) * 3600 + date_part('minute', i) * 60)::numeric + date_part('second', i)::numeric
            INTO seconds FROM CAST(value #>> '{}' AS interval) AS i;
        RETURN to_jsonb(
            CASE WHEN seconds < 0 THEN '-' ELSE '' END || 'P' || div(abs(seconds), 86400) || 'DT'
            || div(mod(abs(seconds), 86400), 1) || '.'
            || lpad(((mod(abs(seconds), 1) * 1000000)::integer)::text, 6, '0') || 'S'
        );
    END IF;
    RETURN value;
END
$$;

-- A row of a table, with its columns as outboxkit_plain has them.
CREATE OR REPLACE FUNCTION {at}outboxkit_row(relation oid, content jsonb) RETURNS jsonb
LANGUAGE sql STABLE SET search_path {path} AS $$
    SELECT content || coalesce(jsonb_object_agg(a.attname, outboxkit_plain(content -> a.attname, a.atttypid)), '{}')
    FROM pg_attribute AS a JOIN pg_type AS t ON t.oid = a.atttypid
    WHERE a.attrelid = relation AND a.attnum > 0 AND NOT a.attisdropped AND content ? a.attname
        AND (a.atttypid IN ('numeric'::regtype, 'bytea'::regtype, 'interval'::regtype)
             OR t.typtype = 'd' OR t.typcategory = 'A')
$$;

-- CREATE TRIGGER capture AFTER INSERT OR UPDATE OR DELETE ON orders
--     FOR EACH ROW EXECUTE FUNCTION outboxkit_capture('orders', 'order', 'id');
-- Arguments: topic, the beginning of the type (order.created …), the columns of the ordering key, comma-separated.
CREATE OR REPLACE FUNCTION {at}outboxkit_capture() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER SET search_path {path} AS $$
DECLARE
    before jsonb := CASE WHEN TG_OP = 'INSERT' THEN '{}' ELSE outboxkit_row(TG_RELID, to_jsonb(OLD)) END;
    after jsonb := CASE WHEN TG_OP = 'DELETE' THEN '{}' ELSE outboxkit_row(TG_RELID, to_jsonb(NEW)) END;
    change text := CASE TG_OP WHEN 'INSERT' THEN 'created' WHEN 'UPDATE' THEN 'updated' ELSE 'deleted' END;
    present jsonb := CASE WHEN TG_OP = 'DELETE' THEN before ELSE after END;
    key_columns text[] := (
        SELECT array_agg(btrim(name) ORDER BY place)
        FROM unnest(string_to_array(TG_ARGV[2], ',')) WITH ORDINALITY AS columns (name, place)
    );
    changed text[];
    key text;
BEGIN
    IF NOT coalesce(present ?& key_columns, false) THEN
        RAISE EXCEPTION 'outboxkit_capture on %: the key is made of columns of the table, not of %', TG_TABLE_NAME,
            coalesce(TG_ARGV[2], 'nothing') USING ERRCODE = '42703';
    END IF;
    SELECT coalesce(array_agg(name ORDER BY name), '{}') INTO changed
    FROM jsonb_object_keys(before || after) AS name
    WHERE before -> name IS DISTINCT FROM after -> name;
    IF changed = '{}' THEN
        RETURN NULL;
    END IF;
    SELECT string_agg(present ->> name, '/' ORDER BY place) INTO key
    FROM unnest(key_columns) WITH ORDINALITY AS columns (name, place);
    PERFORM outboxkit_emit(
        TG_ARGV[0],
        TG_ARGV[1] || '.' || change,
        jsonb_build_object(
            'change', change,
            'key', (SELECT jsonb_object_agg(name, present -> name) FROM unnest(key_columns) AS name),
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

-- Who wrote an entry of outbox_audit, and when, is told by the database; only the owner of the table may say when.
CREATE OR REPLACE FUNCTION {at}outboxkit_audit() RETURNS trigger
LANGUAGE plpgsql SET search_path {path} AS $$
BEGIN
    NEW.login := session_user;
    IF NOT pg_has_role(current_user, (SELECT c.relowner FROM pg_class AS c WHERE c.oid = TG_RELID), 'MEMBER') THEN
        NEW.at := clock_timestamp();
    END IF;
    RETURN NEW;
END
$$;

-- What a relay may delete counts from these times: whoever ends a letter or a saga does not choose when that was. And a
-- letter is decided about by those who may send it anywhere; the others close the ones whose replay has ended.
CREATE OR REPLACE FUNCTION {at}outboxkit_closed() RETURNS trigger
LANGUAGE plpgsql SET search_path {path} AS $$
BEGIN
    IF pg_has_role(current_user, (SELECT c.relowner FROM pg_class AS c WHERE c.oid = TG_RELID), 'MEMBER') THEN
        RETURN NEW;
    END IF;
    IF NEW.state = OLD.state THEN
        NEW.closed_at := OLD.closed_at;
        RETURN NEW;
    END IF;
    IF (OLD.state, NEW.state) <> ('replaying', 'replayed')
       AND NOT has_column_privilege(current_user, TG_RELID, 'replay_to', 'UPDATE') THEN
        RAISE EXCEPTION 'the dead letter % is %; % may not decide that it is %', OLD.id, OLD.state, current_user, NEW.state
            USING ERRCODE = '42501', HINT = 'outboxkit dlq does it: role repairer, or outboxkit_discard: role operator';
    END IF;
    NEW.closed_at := CASE WHEN NEW.state IN ('replayed', 'discarded') THEN clock_timestamp() END;
    RETURN NEW;
END
$$;

CREATE OR REPLACE FUNCTION {at}outboxkit_updated() RETURNS trigger
LANGUAGE plpgsql SET search_path {path} AS $$
BEGIN
    IF NOT pg_has_role(current_user, (SELECT c.relowner FROM pg_class AS c WHERE c.oid = TG_RELID), 'MEMBER') THEN
        NEW.updated_at := clock_timestamp();
    END IF;
    RETURN NEW;
END
$$;

DO $$
BEGIN
    DROP TRIGGER IF EXISTS outboxkit_audit ON {at}outbox_audit;
    CREATE TRIGGER outboxkit_audit BEFORE INSERT ON {at}outbox_audit
        FOR EACH ROW EXECUTE FUNCTION {at}outboxkit_audit();
    DROP TRIGGER IF EXISTS outboxkit_closed ON {at}dead_letters;
    CREATE TRIGGER outboxkit_closed BEFORE UPDATE ON {at}dead_letters
        FOR EACH ROW EXECUTE FUNCTION {at}outboxkit_closed();
    DROP TRIGGER IF EXISTS outboxkit_updated ON {at}outbox_sagas;
    CREATE TRIGGER outboxkit_updated BEFORE UPDATE ON {at}outbox_sagas
        FOR EACH ROW EXECUTE FUNCTION {at}outboxkit_updated();
END
$$;

-- In a script that somebody runs elsewhere: the path of the moment, with temporary tables last.
DO $$
BEGIN
    EXECUTE format('ALTER FUNCTION outboxkit_emit SET search_path = %I, pg_temp', current_schema());
    EXECUTE format('ALTER FUNCTION outboxkit_plain SET search_path = %I, pg_temp', current_schema());
    EXECUTE format('ALTER FUNCTION outboxkit_row SET search_path = %I, pg_temp', current_schema());
    EXECUTE format('ALTER FUNCTION outboxkit_audit SET search_path = %I, pg_temp', current_schema());
    EXECUTE format('ALTER FUNCTION outboxkit_closed SET search_path = %I, pg_temp', current_schema());
    EXECUTE format('ALTER FUNCTION outboxkit_updated SET search_path = %I, pg_temp', current_schema());
    EXECUTE format('ALTER FUNCTION outboxkit_capture SET search_path = %I, pg_temp', current_schema());
END
$$;
