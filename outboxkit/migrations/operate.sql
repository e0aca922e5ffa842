-- What operators do who may not see what messages hold. SECURITY DEFINER: each of these is one decision, checked, and
-- written to outbox_audit under the name of the login, which nobody chooses; the last two are a relay's and a consumer's.
-- {schema} is where our tables are; pg_temp is named last, so that no temporary table of the caller's takes their place.

CREATE OR REPLACE FUNCTION outboxkit_pause(scope text, target text, reason text, lasts interval DEFAULT NULL) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
BEGIN
    IF outboxkit_pause.scope NOT IN ('destination', 'type', 'key') OR outboxkit_pause.target IS NULL
       OR coalesce(btrim(outboxkit_pause.reason), '') = '' OR btrim(outboxkit_pause.target) = '' THEN
        RAISE EXCEPTION 'a pause is of a destination, a type or a key, names it, and has a reason'
            USING ERRCODE = '22023';
    END IF;
    IF outboxkit_pause.lasts <= interval '0' OR outboxkit_pause.lasts > interval '366 days' THEN
        RAISE EXCEPTION 'a pause lasts at most 366 days, or has no end; got %', outboxkit_pause.lasts
            USING ERRCODE = '22023';
    END IF;
    DELETE FROM outbox_control AS c
        WHERE c.scope = outboxkit_pause.scope AND c.target = outboxkit_pause.target;
    INSERT INTO outbox_control (scope, target, reason, set_by, until) VALUES (
        outboxkit_pause.scope, outboxkit_pause.target, outboxkit_pause.reason, session_user,
        clock_timestamp() + outboxkit_pause.lasts
    );
    INSERT INTO outbox_audit (who, action, target, why) VALUES (
        session_user, 'control.pause', outboxkit_pause.scope || ' ' || outboxkit_pause.target, outboxkit_pause.reason
    );
END
$$;

CREATE OR REPLACE FUNCTION outboxkit_resume(scope text, target text, why text DEFAULT '') RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
BEGIN
    DELETE FROM outbox_control AS c
        WHERE c.scope = outboxkit_resume.scope AND c.target = outboxkit_resume.target;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO outbox_audit (who, action, target, why) VALUES (
        session_user, 'control.resume', outboxkit_resume.scope || ' ' || outboxkit_resume.target, outboxkit_resume.why
    );
    RETURN true;
END
$$;

-- A stopped key is named by its topic and the position of its head, because the key itself is not shown.
CREATE OR REPLACE FUNCTION outboxkit_ask(topic text, head bigint, request text, why text) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
BEGIN
    IF outboxkit_ask.request NOT IN ('release', 'skip') THEN
        RAISE EXCEPTION 'a stopped key is released or skipped, not %', outboxkit_ask.request USING ERRCODE = '22023';
    END IF;
    UPDATE outbox_stopped_keys AS k SET request = outboxkit_ask.request, requested_by = session_user
        WHERE k.topic = outboxkit_ask.topic AND k.position = outboxkit_ask.head
            AND k.request IS DISTINCT FROM 'repair';
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO outbox_audit (who, action, target, why) VALUES (
        session_user, 'quarantine.' || outboxkit_ask.request,
        outboxkit_ask.topic || ' at ' || outboxkit_ask.head, coalesce(outboxkit_ask.why, '')
    );
    RETURN true;
END
$$;

CREATE OR REPLACE FUNCTION outboxkit_discard(letter uuid, why text) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
BEGIN
    UPDATE dead_letters AS d SET state = 'discarded', closed_at = clock_timestamp()
        WHERE d.id = outboxkit_discard.letter AND d.state = 'dead';
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO outbox_audit (who, action, target, why)
        VALUES (session_user, 'dlq.discard', outboxkit_discard.letter::text, coalesce(outboxkit_discard.why, ''));
    RETURN true;
END
$$;

-- The dead head of a parked key returns to its place, unchanged. Every other replay needs its consumer's schema and the
-- message itself: that is `outboxkit dlq replay`, under a role that may read it.
CREATE OR REPLACE FUNCTION outboxkit_replay(letter uuid, why text) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
DECLARE
    buried record;
BEGIN
    SELECT * INTO buried FROM dead_letters AS d WHERE d.id = outboxkit_replay.letter FOR UPDATE;
    IF NOT FOUND OR buried.state <> 'dead' THEN
        RETURN false;
    END IF;
    IF buried.generation >= 3 THEN
        RAISE EXCEPTION '% was replayed % times and died each time', buried.id, buried.generation USING ERRCODE = '55000';
    END IF;
    UPDATE outbox_stopped_keys AS k SET request = 'repair', requested_by = session_user
        WHERE buried.side = 'relay' AND k.topic = buried.topic AND k.key = buried.key AND k.position = buried.source_position
            AND k.reason = 'parked';
    IF NOT FOUND THEN
        RAISE EXCEPTION '% is not the head of a parked key', buried.id
            USING ERRCODE = '55000', HINT = 'outboxkit dlq replay does it, which reads the message: role repairer';
    END IF;
    UPDATE dead_letters AS d SET state = 'replaying', replaying_since = clock_timestamp() WHERE d.id = buried.id;
    INSERT INTO outbox_audit (who, action, target, why)
        VALUES (session_user, 'dlq.replay', outboxkit_replay.letter::text, coalesce(outboxkit_replay.why, ''));
    RETURN true;
END
$$;

-- What a relay cleans up, without a right to delete: only what has ended, in portions, none that others have locked, and
-- nothing that is younger than a floor, so that who takes a relay over cannot erase what just happened.
CREATE OR REPLACE FUNCTION outboxkit_prune(relation text, kept interval, at_most integer) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
DECLARE
    deleted bigint;
    at_least interval := CASE outboxkit_prune.relation
        WHEN 'outbox_audit' THEN '30 days' WHEN 'outbox_ledger' THEN '1 hour' WHEN 'outbox_idempotency' THEN '0'
        WHEN 'inbox_messages' THEN '1 day' WHEN 'dead_letters' THEN '1 day' WHEN 'outbox_sagas' THEN '1 day'
    END;
    is_old text := CASE outboxkit_prune.relation
        WHEN 'outbox_audit' THEN 'r.at < $1'
        WHEN 'outbox_ledger' THEN 'r.published_at < $1'
        WHEN 'outbox_idempotency' THEN 'r.expires_at < clock_timestamp()'
        WHEN 'dead_letters' THEN 'r.closed_at < $1'
        WHEN 'outbox_sagas' THEN 'r.updated_at < $1 AND r.status IN (''completed'', ''compensated'')'
        WHEN 'inbox_messages' THEN 'r.handled_at < $1 AND NOT EXISTS (SELECT FROM dead_letters AS d
            WHERE d.message_id = r.message_id AND d.consumer = r.consumer AND d.source = r.source AND d.closed_at IS NULL)'
    END;
BEGIN
    IF outboxkit_prune.kept >= at_least IS NOT TRUE THEN
        RAISE EXCEPTION 'a relay does not delete from % what is younger than %; asked for %',
            outboxkit_prune.relation, at_least, outboxkit_prune.kept
            USING ERRCODE = '42501', HINT = 'raise its retention, or run outboxkit prune as the owner of the tables';
    END IF;
    IF outboxkit_prune.at_most BETWEEN 1 AND 100000 IS NOT TRUE THEN
        RAISE EXCEPTION 'a portion has 1 to 100000 rows; asked for %', outboxkit_prune.at_most USING ERRCODE = '22023';
    END IF;
    EXECUTE format(
        'DELETE FROM %1$I WHERE ctid = ANY (ARRAY(SELECT r.ctid FROM %1$I AS r WHERE %2$s LIMIT $2 FOR UPDATE SKIP LOCKED))',
        outboxkit_prune.relation, is_old
    ) USING clock_timestamp() - outboxkit_prune.kept, outboxkit_prune.at_most;
    GET DIAGNOSTICS deleted = ROW_COUNT;
    RETURN deleted;
END
$$;

-- Whether a message is the replay of a letter, for a consumer that may not see the letters of others: who asks knows the
-- letter's number and the whole message already. Names are bytes, because a header may hold what is no text.
CREATE OR REPLACE FUNCTION outboxkit_is_replay(letter uuid, receiver bytea, topic bytea, payload bytea) RETURNS boolean
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
    SELECT EXISTS (
        SELECT FROM dead_letters AS d
        WHERE d.id = outboxkit_is_replay.letter AND d.state IN ('replaying', 'replayed')
            AND convert_to(coalesce(d.replay_to, d.consumer), 'UTF8') = outboxkit_is_replay.receiver
            AND convert_to(d.topic, 'UTF8') = outboxkit_is_replay.topic
            AND coalesce(d.payload, '') = outboxkit_is_replay.payload
    )
$$;
