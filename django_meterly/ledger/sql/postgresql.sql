-- The movements of ledger/portable.py, each as one function: one round trip.
--
-- They follow the same rules: what must hold stands in an UPDATE's WHERE; holds are
-- locked before accounts; times are the database's. A refusal is a "code", never an
-- exception, so that it needs no savepoint and leaves a caller's transaction as it was.
--
-- A function's arguments and what it answers are part of its name: change them,
-- and the number at its end goes up, because processes of the version before are
-- still calling the old one. Names are unqualified: the tables are found as Django
-- finds them.
--
-- The answer is one JSON array: one value costs both sides less than ten columns,
-- and its times need no parsing by Django's time zone rules. ledger/movements.py says
-- what is in it, and what its first element, the code, means.
--
-- (...) IS TRUE keeps a condition away from the indexes. A row is found by its own
-- unique key; before a table's first ANALYZE the planner may prefer the index of
-- all live holds, or of all the workspace's customers, and a session keeps its
-- plan. Statements are few, because each costs more than what it does.

CREATE OR REPLACE FUNCTION meterly_spend_1(
    workspace_ bigint,      -- null: the one called
    workspace_name_ text,
    key_ text,
    fingerprint_ text,
    customer_ text,
    unit_ text,             -- null: the customer's own
    amount_ bigint,
    reference_ text,
    description_ text,
    entry_ text,
    hold_ text,             -- null: use at once, without a hold
    ttl_ integer            -- seconds
) RETURNS json LANGUAGE plpgsql AS $$
DECLARE
    now_ timestamptz := clock_timestamp();
    until_ timestamptz;
    -- Zero for a use: what the balance loses, and what the reserved ones gain.
    used_ CONSTANT bigint := CASE WHEN hold_ IS NULL THEN amount_ ELSE 0 END;
    held_ CONSTANT bigint := amount_ - used_;
    code_ text;
    account_ bigint;
    unit_of_account_ text;
    balance_ bigint;
    reserved_ bigint;
    hold_pk_ bigint;
    due_ boolean;
    known_ text;
BEGIN
    IF (amount_ >= 1) IS NOT TRUE THEN
        RETURN json_build_array('invalid');
    END IF;
    IF workspace_ IS NULL THEN
        SELECT w.id INTO workspace_
        FROM meterly_ledger_workspace w WHERE w.name = workspace_name_;
    END IF;
    LOOP
        -- A record is the key of a call that was no movement: a mismatch.
        SELECT coalesce(
            (SELECT e.fingerprint FROM meterly_ledger_entry e
            WHERE e.workspace_id = workspace_ AND e.idempotency_key = key_),
            (SELECT '' FROM meterly_ledger_record r
            WHERE r.workspace_id = workspace_ AND r.idempotency_key = key_)
        ) INTO known_;
        IF known_ <> fingerprint_ THEN
            RETURN json_build_array('mismatch');
        END IF;
        IF known_ IS NOT NULL THEN
            RETURN (
                SELECT json_build_array('replayed', a.id, a.unit, e.balance_after,
                    e.reserved_after, e.public_id, e.created_at, h.public_id,
                    CASE WHEN h.status = 'reserved' AND h.expires_at <= now_
                        THEN 'expired' ELSE h.status END,
                    h.expires_at)
                FROM meterly_ledger_entry e
                JOIN meterly_ledger_account a ON a.id = e.account_id
                LEFT JOIN meterly_ledger_hold h ON h.id = e.hold_id
                WHERE e.workspace_id = workspace_ AND e.idempotency_key = key_
            );
        END IF;
        -- Set by the round before: the key was looked for once more, because a
        -- call with it may have taken the last credits just then.
        IF code_ IS NOT NULL THEN
            RETURN json_build_array(
                code_, account_, unit_of_account_, balance_, reserved_);
        END IF;

        UPDATE meterly_ledger_account a
        SET balance = a.balance - used_, reserved = a.reserved + held_
        FROM meterly_ledger_customer c
        WHERE c.public_id = customer_ AND (c.workspace_id = workspace_) IS TRUE
            AND a.customer_id = c.id AND a.unit = coalesce(unit_, c.credit_unit)
            AND a.balance - a.reserved >= amount_
        RETURNING a.id, a.unit, a.balance, a.reserved
        INTO account_, unit_of_account_, balance_, reserved_;

        IF FOUND THEN
            -- The UPDATE may have waited for a lock. A hold lasts from now on.
            now_ := clock_timestamp();
            IF hold_ IS NOT NULL THEN
                until_ := now_ + make_interval(secs => ttl_);
                INSERT INTO meterly_ledger_hold (public_id, account_id, amount,
                    status, reference, expires_at, created_at)
                VALUES (hold_, account_, amount_,
                    'reserved', reference_, until_, now_)
                RETURNING id INTO hold_pk_;
            END IF;
            INSERT INTO meterly_ledger_entry (public_id, workspace_id, account_id,
                hold_id, kind, amount, balance_delta, reserved_delta,
                balance_after, reserved_after, reference, description,
                idempotency_key, fingerprint, created_at)
            VALUES (entry_, workspace_, account_, hold_pk_,
                CASE WHEN hold_ IS NULL
                    THEN 'credits_used' ELSE 'credits_reserved' END,
                amount_, -used_, held_, balance_, reserved_, reference_,
                description_, key_, fingerprint_, now_)
            ON CONFLICT (workspace_id, idempotency_key) DO NOTHING;
            IF FOUND THEN
                RETURN json_build_array('moved', account_, unit_of_account_,
                    balance_, reserved_, entry_, now_, hold_,
                    CASE WHEN hold_ IS NOT NULL THEN 'reserved' END, until_);
            END IF;
            -- Another call with this key was first: take everything back, and
            -- find its entry.
            UPDATE meterly_ledger_account a
            SET balance = a.balance + used_, reserved = a.reserved - held_
            WHERE a.id = account_;
            DELETE FROM meterly_ledger_hold h WHERE h.id = hold_pk_;
            CONTINUE;
        END IF;

        -- One statement, so that it sees the balance and the due holds of one
        -- moment: a neighbour may be expiring them.
        now_ := clock_timestamp();
        SELECT a.id, coalesce(unit_, c.credit_unit),
            coalesce(a.balance, 0), coalesce(a.reserved, 0),
            EXISTS (
                SELECT FROM meterly_ledger_hold h
                WHERE h.account_id = a.id
                    AND h.status = 'reserved' AND h.expires_at <= now_
            )
        INTO account_, unit_of_account_, balance_, reserved_, due_
        FROM meterly_ledger_customer c
        LEFT JOIN meterly_ledger_account a
            ON a.customer_id = c.id AND a.unit = coalesce(unit_, c.credit_unit)
        WHERE c.public_id = customer_ AND (c.workspace_id = workspace_) IS TRUE;
        IF NOT FOUND THEN
            RETURN json_build_array('not_found');
        END IF;
        -- Credits have arrived since the UPDATE: try again.
        CONTINUE WHEN account_ IS NOT NULL AND balance_ - reserved_ >= amount_;
        code_ := CASE WHEN due_ THEN 'due' ELSE 'insufficient' END;
    END LOOP;
END
$$;

CREATE OR REPLACE FUNCTION meterly_close_1(
    workspace_ bigint,      -- null: the one called
    workspace_name_ text,
    key_ text,
    fingerprint_ text,
    hold_ text,
    status_ text,           -- committed or released
    charged_ bigint,        -- null: the whole hold
    entry_ text
) RETURNS json LANGUAGE plpgsql AS $$
DECLARE
    now_ CONSTANT timestamptz := statement_timestamp();
    code_ text;
    known_ text;
    customer_ text;
    unit_ text;
    balance_ bigint;
    reserved_ bigint;
    hold_pk_ bigint;
    account_ bigint;
    amount_ bigint;
    reference_ text;
    present_ text;
    until_ timestamptz;
    taken_ bigint;
BEGIN
    IF charged_ < 0 THEN
        RETURN json_build_array('invalid');
    END IF;
    IF workspace_ IS NULL THEN
        SELECT w.id INTO workspace_
        FROM meterly_ledger_workspace w WHERE w.name = workspace_name_;
    END IF;
    LOOP
        -- A record is the key of a call that moved nothing.
        SELECT coalesce(
            (SELECT e.fingerprint FROM meterly_ledger_entry e
            WHERE e.workspace_id = workspace_ AND e.idempotency_key = key_),
            (SELECT r.fingerprint FROM meterly_ledger_record r
            WHERE r.workspace_id = workspace_ AND r.idempotency_key = key_)
        ) INTO known_;
        IF known_ <> fingerprint_ THEN
            RETURN json_build_array('mismatch');
        END IF;

        IF known_ IS NULL AND code_ IS NULL THEN
            UPDATE meterly_ledger_hold h
            SET status = status_, closed_at = now_
            FROM meterly_ledger_account a
            JOIN meterly_ledger_customer c ON c.id = a.customer_id
            WHERE h.public_id = hold_ AND a.id = h.account_id
                AND (c.workspace_id = workspace_) IS TRUE
                AND (h.status = 'reserved' AND h.expires_at > now_) IS TRUE
                AND coalesce(charged_, 0) <= h.amount
            RETURNING h.id, h.account_id, h.amount, h.reference, h.expires_at,
                c.public_id, a.unit
            INTO hold_pk_, account_, amount_, reference_, until_, customer_, unit_;
            IF FOUND THEN
                taken_ := coalesce(charged_, amount_);
                UPDATE meterly_ledger_account a
                SET balance = a.balance - taken_, reserved = a.reserved - amount_
                WHERE a.id = account_
                RETURNING a.balance, a.reserved INTO balance_, reserved_;
                INSERT INTO meterly_ledger_entry (public_id, workspace_id,
                    account_id, hold_id, kind, amount, balance_delta,
                    reserved_delta, balance_after, reserved_after, reference,
                    description, idempotency_key, fingerprint, created_at)
                VALUES (entry_, workspace_,
                    account_, hold_pk_, 'credits_' || status_,
                    CASE status_ WHEN 'committed' THEN taken_ ELSE amount_ END,
                    -taken_, -amount_, balance_, reserved_, reference_,
                    '', key_, fingerprint_, now_)
                ON CONFLICT (workspace_id, idempotency_key) DO NOTHING;
                IF FOUND THEN
                    RETURN json_build_array('moved', customer_, unit_, balance_,
                        reserved_, amount_, reference_, status_, until_);
                END IF;
                -- Another call with this key was first: take everything back, and
                -- find its entry.
                UPDATE meterly_ledger_account a
                SET balance = a.balance + taken_, reserved = a.reserved + amount_
                WHERE a.id = account_;
                UPDATE meterly_ledger_hold h
                SET status = 'reserved', closed_at = NULL
                WHERE h.id = hold_pk_;
                CONTINUE;
            END IF;
            -- Look for the key once more: a call with it may have closed the hold
            -- just then.
            code_ := 'closed';
            CONTINUE;
        END IF;

        SELECT h.amount, h.reference, h.status, h.expires_at,
            c.public_id, a.unit, a.balance,
            -- A hold whose time is over reserves nothing, swept or not.
            greatest(0, a.reserved - (
                SELECT coalesce(sum(due.amount), 0) FROM meterly_ledger_hold due
                WHERE due.account_id = a.id
                    AND due.status = 'reserved' AND due.expires_at <= now_
            ))
        INTO amount_, reference_, present_, until_,
            customer_, unit_, balance_, reserved_
        FROM meterly_ledger_hold h
        JOIN meterly_ledger_account a ON a.id = h.account_id
        JOIN meterly_ledger_customer c ON c.id = a.customer_id
        WHERE h.public_id = hold_ AND (c.workspace_id = workspace_) IS TRUE;
        IF NOT FOUND THEN
            RETURN json_build_array('not_found');
        END IF;
        IF known_ IS NOT NULL THEN
            code_ := 'replayed';
            -- A record has no balance of its own.
            SELECT coalesce(max(e.balance_after), balance_),
                coalesce(max(e.reserved_after), reserved_)
            INTO balance_, reserved_
            FROM meterly_ledger_entry e
            WHERE e.workspace_id = workspace_ AND e.idempotency_key = key_;
        ELSIF coalesce(charged_, 0) > amount_ THEN
            code_ := 'too_much';
        ELSE
            code_ := CASE present_
                WHEN 'reserved' THEN 'due' WHEN status_ THEN 'already'
                ELSE 'closed' END;
        END IF;
        IF present_ = 'reserved' AND until_ <= now_ THEN
            present_ := 'expired';
        END IF;
        RETURN json_build_array(code_, customer_, unit_, balance_,
            reserved_, amount_, reference_, present_, until_);
    END LOOP;
END
$$;
