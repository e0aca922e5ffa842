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

-- A row as outboxkit's own codec writes it, so that one event class reads what the ORM and what the trigger captured:
-- numeric as text, bytea as base64, an interval as P1DT2.000000S (a month has 30 days and a year 365, as drivers count).
CREATE OR REPLACE FUNCTION outboxkit_plain(of_row jsonb, relation oid) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    WITH special AS (
        SELECT a.attname AS name, item.typname AS kind, of_row -> a.attname AS given
        FROM pg_attribute AS a
        JOIN pg_type AS own ON own.oid = a.atttypid
        JOIN pg_type AS base ON base.oid = CASE WHEN own.typbasetype = 0 THEN own.oid ELSE own.typbasetype END
        JOIN pg_type AS item ON item.oid = CASE WHEN base.typcategory = 'A' THEN base.typelem ELSE base.oid END
        WHERE a.attrelid = relation AND a.attnum > 0 AND NOT a.attisdropped
          AND item.oid IN ('numeric'::regtype, 'bytea'::regtype, 'interval'::regtype)
    ), parts AS (
        SELECT name, kind, jsonb_typeof(given) = 'array' AS many, place, part, part #>> '{}' AS as_text
        FROM special CROSS JOIN LATERAL jsonb_array_elements(
            CASE WHEN jsonb_typeof(given) = 'array' THEN given ELSE jsonb_build_array(given) END
        ) WITH ORDINALITY AS parts (part, place)
        WHERE given IS NOT NULL
    ), spans AS (
        SELECT parts.*, (extract(year FROM span) * 365 + extract(month FROM span) * 30 + extract(day FROM span)) * 86400
            + extract(hour FROM span) * 3600 + extract(minute FROM span) * 60 + extract(second FROM span) AS seconds
        FROM parts CROSS JOIN LATERAL (SELECT CASE WHEN kind = 'interval' THEN as_text::interval END AS span) AS given
    ), written AS (
        SELECT name, many, place, CASE
            WHEN jsonb_typeof(part) NOT IN ('number', 'string') THEN part
            WHEN kind = 'numeric' THEN to_jsonb(as_text)
            WHEN kind = 'bytea' THEN to_jsonb(translate(encode(as_text::bytea, 'base64'), E'\n', ''))
            ELSE to_jsonb(concat(
                CASE WHEN seconds < 0 THEN '-' END, 'P', div(abs(seconds), 86400), 'DT', div(mod(abs(seconds), 86400), 1),
                '.', lpad((mod(abs(seconds), 1) * 1000000)::integer::text, 6, '0'), 'S'
            ))
        END AS part
        FROM spans
    ), columns AS (
        SELECT name, CASE WHEN bool_or(many) THEN jsonb_agg(part ORDER BY place) ELSE jsonb_agg(part) -> 0 END AS value
        FROM written GROUP BY name
    )
    SELECT of_row || coalesce((SELECT jsonb_object_agg(name, value) FROM columns), '{}'::jsonb)
$$;

-- CREATE TRIGGER capture AFTER INSERT OR UPDATE OR DELETE ON orders
--     FOR EACH ROW EXECUTE FUNCTION outboxkit_capture('orders', 'order', 'id');
-- Arguments: topic, the beginning of the type (order.created …), the columns of the ordering key, comma-separated.
CREATE OR REPLACE FUNCTION {at}outboxkit_capture() RETURNS trigger
LANGUAGE plpgsql SECURITY INVOKER SET search_path {path} AS $$
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
    before := outboxkit_plain(before, TG_RELID);
    after := outboxkit_plain(after, TG_RELID);
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

-- In a script that somebody runs elsewhere: the path of the moment, with temporary tables last.
DO $$
BEGIN
    EXECUTE format('ALTER FUNCTION outboxkit_emit SET search_path = %I, pg_temp', current_schema());
    EXECUTE format('ALTER FUNCTION outboxkit_capture SET search_path = %I, pg_temp', current_schema());
END
$$;
