-- The movements of ledger/operations.py, each as one function: one round trip.
--
-- They do what the portable path there does, statement by statement, under the
-- same rules: what must hold stands in an UPDATE's WHERE; holds are locked before
-- accounts; times are the database's. A refusal is a "code", never an exception,
-- so that it needs no savepoint and leaves a caller's transaction as it was.
--
-- A function's arguments and columns are part of its name: change them, and the
-- number at its end goes up, because processes of the version before are still
-- calling the old one. Names are unqualified: the tables are found as Django
-- finds them.
--
-- code: moved, replayed, mismatch, not_found, insufficient, too_much, closed
-- (the hold is in another final state), or due: holds of the account are past
-- their time, expire them and call again.

CREATE OR REPLACE FUNCTION meterly_spend_1(
    workspace_ bigint,
    key_ text,
    fingerprint_ text,
    customer_ text,
    unit_ text,             -- null: the customer's own
    amount_ bigint,
    reference_ text,
    description_ text,
    entry_ text,
    hold_ text,             -- null: use at once, without a hold
    ttl_ integer,           -- seconds
    OUT code text,
    OUT account_id bigint,
    OUT unit text,
    OUT balance bigint,
    OUT reserved bigint,
    OUT entry text,
    OUT created_at timestamptz,
    OUT hold text,
    OUT status text,
    OUT expires_at timestamptz
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    now_ CONSTANT timestamptz := statement_timestamp();
    -- Zero for a use: what the balance loses, and what the reserved ones gain.
    used_ CONSTANT bigint := CASE WHEN hold_ IS NULL THEN amount_ ELSE 0 END;
    held_ CONSTANT bigint := amount_ - used_;
    account_ bigint;
    unit_of_account_ text;
    balance_ bigint;
    reserved_ bigint;
    hold_pk_ bigint;
    known_ text;
BEGIN
    LOOP
        SELECT e.fingerprint INTO known_
        FROM meterly_ledger_entry e
        WHERE e.workspace_id = workspace_ AND e.idempotency_key = key_;
        IF FOUND THEN
            IF known_ <> fingerprint_ THEN
                code := 'mismatch';
                RETURN;
            END IF;
            code := 'replayed';
            SELECT a.unit, e.balance_after, e.reserved_after, e.public_id,
                e.created_at, h.public_id, h.expires_at,
                CASE WHEN h.status = 'reserved' AND h.expires_at <= now_
                    THEN 'expired' ELSE h.status END
            INTO unit, balance, reserved, entry, created_at, hold, expires_at, status
            FROM meterly_ledger_entry e
            JOIN meterly_ledger_account a ON a.id = e.account_id
            LEFT JOIN meterly_ledger_hold h ON h.id = e.hold_id
            WHERE e.workspace_id = workspace_ AND e.idempotency_key = key_;
            RETURN;
        END IF;
        IF EXISTS (
            SELECT FROM meterly_ledger_record r
            WHERE r.workspace_id = workspace_ AND r.idempotency_key = key_
        ) THEN
            -- The key of a call that was no movement.
            code := 'mismatch';
            RETURN;
        END IF;
        -- Set by the round before: the key was looked for once more, because a
        -- call with it may have taken the last credits just then.
        IF code IS NOT NULL THEN
            RETURN;
        END IF;

        UPDATE meterly_ledger_account a
        SET balance = a.balance - used_, reserved = a.reserved + held_
        FROM meterly_ledger_customer c
        WHERE c.public_id = customer_ AND c.workspace_id = workspace_
            AND a.customer_id = c.id AND a.unit = coalesce(unit_, c.credit_unit)
            AND a.balance - a.reserved >= amount_
        RETURNING a.id, a.unit, a.balance, a.reserved
        INTO account_, unit_of_account_, balance_, reserved_;

        IF FOUND THEN
            IF hold_ IS NOT NULL THEN
                expires_at := now_ + make_interval(secs => ttl_);
                INSERT INTO meterly_ledger_hold (public_id, account_id, amount,
                    status, reference, expires_at, created_at)
                VALUES (hold_, account_, amount_,
                    'reserved', reference_, expires_at, now_)
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
                code := 'moved';
                unit := unit_of_account_;
                balance := balance_;
                reserved := reserved_;
                entry := entry_;
                created_at := now_;
                hold := hold_;
                status := CASE WHEN hold_ IS NOT NULL THEN 'reserved' END;
                RETURN;
            END IF;
            -- Another call with this key was first: take everything back, and
            -- find its entry.
            UPDATE meterly_ledger_account a
            SET balance = a.balance + used_, reserved = a.reserved - held_
            WHERE a.id = account_;
            DELETE FROM meterly_ledger_hold WHERE id = hold_pk_;
            CONTINUE;
        END IF;

        SELECT a.id, coalesce(unit_, c.credit_unit),
            coalesce(a.balance, 0), coalesce(a.reserved, 0)
        INTO account_, unit, balance, reserved
        FROM meterly_ledger_customer c
        LEFT JOIN meterly_ledger_account a
            ON a.customer_id = c.id AND a.unit = coalesce(unit_, c.credit_unit)
        WHERE c.public_id = customer_ AND c.workspace_id = workspace_;
        IF NOT FOUND THEN
            code := 'not_found';
            RETURN;
        END IF;
        account_id := account_;
        code := CASE WHEN EXISTS (
            SELECT FROM meterly_ledger_hold h
            WHERE h.account_id = account_
                AND h.status = 'reserved' AND h.expires_at <= now_
        ) THEN 'due' ELSE 'insufficient' END;
    END LOOP;
END
$$;

CREATE OR REPLACE FUNCTION meterly_close_1(
    workspace_ bigint,
    key_ text,
    fingerprint_ text,
    hold_ text,
    status_ text,           -- committed or released
    charged_ bigint,        -- null: the whole hold
    entry_ text,
    OUT code text,
    OUT account_id bigint,
    OUT customer text,
    OUT unit text,
    OUT balance bigint,
    OUT reserved bigint,
    OUT amount bigint,
    OUT reference text,
    OUT status text,
    OUT expires_at timestamptz
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    now_ CONSTANT timestamptz := statement_timestamp();
    known_ text;
    replayed_ boolean := false;
    balance_ bigint;
    reserved_ bigint;
    hold_pk_ bigint;
    account_ bigint;
    amount_ bigint;
    taken_ bigint;
BEGIN
    LOOP
        SELECT e.fingerprint, e.balance_after, e.reserved_after
        INTO known_, balance_, reserved_
        FROM meterly_ledger_entry e
        WHERE e.workspace_id = workspace_ AND e.idempotency_key = key_;
        IF FOUND THEN
            IF known_ <> fingerprint_ THEN
                code := 'mismatch';
                RETURN;
            END IF;
            replayed_ := true;
        ELSIF EXISTS (
            SELECT FROM meterly_ledger_record r
            WHERE r.workspace_id = workspace_ AND r.idempotency_key = key_
        ) THEN
            -- The key of a call that was no movement.
            code := 'mismatch';
            RETURN;
        END IF;

        SELECT h.id, h.account_id, h.amount, h.reference, h.status, h.expires_at,
            c.public_id, a.unit, a.balance, a.reserved
        INTO hold_pk_, account_, amount_, reference, status, expires_at,
            customer, unit, balance, reserved
        FROM meterly_ledger_hold h
        JOIN meterly_ledger_account a ON a.id = h.account_id
        JOIN meterly_ledger_customer c ON c.id = a.customer_id
        WHERE h.public_id = hold_ AND c.workspace_id = workspace_;
        IF NOT FOUND THEN
            code := 'not_found';
            RETURN;
        END IF;
        account_id := account_;
        amount := amount_;
        IF replayed_ THEN
            code := 'replayed';
            balance := balance_;
            reserved := reserved_;
            IF status = 'reserved' AND expires_at <= now_ THEN
                status := 'expired';
            END IF;
            RETURN;
        END IF;
        -- Set by the round before: the hold could not be closed, and the key was
        -- looked for once more, because a call with it may have closed it.
        IF code IS NOT NULL THEN
            code := CASE status
                WHEN 'reserved' THEN 'due' WHEN status_ THEN 'replayed'
                ELSE 'closed' END;
            RETURN;
        END IF;
        taken_ := coalesce(charged_, amount_);
        IF taken_ > amount_ THEN
            code := 'too_much';
            RETURN;
        END IF;

        UPDATE meterly_ledger_hold h
        SET status = status_, closed_at = now_
        WHERE h.id = hold_pk_ AND h.status = 'reserved' AND h.expires_at > now_;
        IF NOT FOUND THEN
            code := 'closed';
            CONTINUE;
        END IF;
        UPDATE meterly_ledger_account a
        SET balance = a.balance - taken_, reserved = a.reserved - amount_
        WHERE a.id = account_
        RETURNING a.balance, a.reserved INTO balance_, reserved_;
        INSERT INTO meterly_ledger_entry (public_id, workspace_id, account_id,
            hold_id, kind, amount, balance_delta, reserved_delta,
            balance_after, reserved_after, reference, description,
            idempotency_key, fingerprint, created_at)
        VALUES (entry_, workspace_, account_,
            hold_pk_, 'credits_' || status_,
            CASE status_ WHEN 'committed' THEN taken_ ELSE amount_ END,
            -taken_, -amount_, balance_, reserved_, reference, '',
            key_, fingerprint_, now_)
        ON CONFLICT (workspace_id, idempotency_key) DO NOTHING;
        IF FOUND THEN
            code := 'moved';
            status := status_;
            balance := balance_;
            reserved := reserved_;
            RETURN;
        END IF;
        -- Another call with this key was first: take everything back, and find
        -- its entry.
        UPDATE meterly_ledger_account a
        SET balance = a.balance + taken_, reserved = a.reserved + amount_
        WHERE a.id = account_;
        UPDATE meterly_ledger_hold h
        SET status = 'reserved', closed_at = NULL
        WHERE h.id = hold_pk_;
    END LOOP;
END
$$;
