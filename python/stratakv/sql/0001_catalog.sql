-- The catalog: what is cached where, for whom, since when; and which versions of weights are retired.
--
-- Blocks and prefixes are named by 16 bytes that say nothing without the store's secret. Both are partitioned by model: a
-- version that is retired is emptied at once. Events are partitioned by day: what is too old is dropped as one.

CREATE TABLE stratakv.models (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    fingerprint uuid NOT NULL UNIQUE,
    name text NOT NULL,
    weights_version text NOT NULL,
    geometry jsonb NOT NULL,
    block_tokens integer NOT NULL,
    block_bytes bigint NOT NULL,
    registered_at timestamptz NOT NULL DEFAULT now(),
    retired_at timestamptz
);
CREATE INDEX models_by_name ON stratakv.models (name, weights_version);
CREATE INDEX models_retired ON stratakv.models (retired_at) WHERE retired_at IS NOT NULL;

CREATE TABLE stratakv.nodes (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL UNIQUE,
    opened_at timestamptz NOT NULL DEFAULT now(),
    seen_at timestamptz NOT NULL DEFAULT now(),
    closed_at timestamptz
);

-- Tiers: 0 RAM, 1 SSD.
CREATE TABLE stratakv.blocks (
    model integer NOT NULL,
    name uuid NOT NULL,
    node integer NOT NULL,
    tier smallint NOT NULL,
    since timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (name, node, tier, model)
) PARTITION BY LIST (model);
CREATE INDEX blocks_by_node ON stratakv.blocks (node, tier);

-- A prefix is named by its last block. `chain`: the names of all its blocks, 16 bytes each. `heat` is the logarithm to base 2
-- of its uses, being put among them, each weighted by 2^(days since 1970): what was used a day later counts twice, and nothing need be aged
-- (forward decay: Cormode et al., ICDE 2009).
CREATE TABLE stratakv.prefixes (
    model integer NOT NULL,
    name uuid NOT NULL,
    space uuid NOT NULL,
    adapter text,
    tenant text,
    tokens integer NOT NULL,
    chain bytea NOT NULL,
    since timestamptz NOT NULL,
    used timestamptz NOT NULL,
    uses bigint NOT NULL,
    heat double precision NOT NULL,
    PRIMARY KEY (name, model)
) PARTITION BY LIST (model);
-- Names are random: compressing them is in vain.
ALTER TABLE stratakv.prefixes ALTER COLUMN chain SET STORAGE EXTERNAL;
CREATE INDEX prefixes_by_heat ON stratakv.prefixes (heat DESC, name);
CREATE INDEX prefixes_by_tenant ON stratakv.prefixes (tenant, heat DESC, name);
CREATE INDEX prefixes_by_use ON stratakv.prefixes (used);
CREATE INDEX prefixes_by_age ON stratakv.prefixes (since);
CREATE INDEX prefixes_by_start ON stratakv.prefixes (model, substring(chain FROM 1 FOR 16));

-- What happened on a node: `opened`, `closed`, `retired`, `restored`, `warmed`; and, of kind `usage`, what a tenant asked of
-- a model since the row before.
CREATE TABLE stratakv.events (
    at timestamptz NOT NULL DEFAULT now(),
    kind text NOT NULL,
    node integer,
    model integer,
    tenant text,
    asked_blocks bigint NOT NULL DEFAULT 0,
    hit_blocks bigint NOT NULL DEFAULT 0,
    loaded_tokens bigint NOT NULL DEFAULT 0,
    put_blocks bigint NOT NULL DEFAULT 0,
    put_bytes bigint NOT NULL DEFAULT 0
) PARTITION BY RANGE (at);
CREATE INDEX events_by_model ON stratakv.events (model, at);
CREATE INDEX events_by_tenant ON stratakv.events (tenant, at);
CREATE INDEX events_by_kind ON stratakv.events (kind, at);

-- The present value of a heat: uses, each halved for every day since.
CREATE FUNCTION stratakv.uses_now(heat double precision) RETURNS double precision
LANGUAGE sql STABLE AS $$
    SELECT power(2::double precision, greatest(least(heat - extract(epoch FROM now()) / 86400, 500), -500))
$$;

-- A heat after so many more uses at a time.
CREATE FUNCTION stratakv.heated(heat double precision, uses bigint, at timestamptz) RETURNS double precision
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN uses = 0 THEN heat ELSE greatest(heat, later)
        + ln(1 + power(2::double precision, greatest(-abs(heat - later), -500))) / ln(2::double precision) END
    FROM (SELECT extract(epoch FROM at) / 86400 + ln(greatest(uses, 1)::double precision) / ln(2::double precision)) AS x (later)
$$;

-- Partitions for the events of today and the days after it.
CREATE FUNCTION stratakv.add_days(days integer) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    day date;
BEGIN
    FOR ahead IN 0 .. days LOOP
        day := (now() AT TIME ZONE 'UTC')::date + ahead;
        EXECUTE format(
            'CREATE TABLE IF NOT EXISTS stratakv.%I PARTITION OF stratakv.events FOR VALUES FROM (%L) TO (%L)',
            'events_' || to_char(day, 'YYYYMMDD'), day || ' 00:00+00', (day + 1) || ' 00:00+00'
        );
    END LOOP;
END $$;
SELECT stratakv.add_days(2);

-- Drops days of events that are older than so many.
CREATE FUNCTION stratakv.drop_days(days integer) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    old regclass;
BEGIN
    FOR old IN
        SELECT i.inhrelid::regclass FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent = 'stratakv.events'::regclass
            AND right(c.relname, 8) < to_char((now() AT TIME ZONE 'UTC')::date - days, 'YYYYMMDD')
    LOOP
        EXECUTE format('DROP TABLE %s', old);
    END LOOP;
END $$;

-- Drops prefixes that nobody used for so many days, and nodes that were not seen.
CREATE FUNCTION stratakv.clean(days integer) RETURNS void LANGUAGE sql AS $$
    DELETE FROM stratakv.prefixes WHERE used < now() - make_interval(days => days);
    DELETE FROM stratakv.blocks WHERE node IN (
        SELECT id FROM stratakv.nodes WHERE seen_at < now() - make_interval(days => days)
    );
    DELETE FROM stratakv.nodes WHERE seen_at < now() - make_interval(days => days);
$$;

-- Enters a model, with partitions of its own; another shape of a version that is retired is, too. Tables are attached, which
-- keeps no writer waiting, and in the order in which all touch them.
CREATE FUNCTION stratakv.add_model(
    of_fingerprint uuid, of_name text, of_version text, of_geometry jsonb, tokens integer, bytes bigint
) RETURNS TABLE (id integer, retired boolean) LANGUAGE plpgsql AS $$
DECLARE
    known stratakv.models;
    kind text;
BEGIN
    SELECT * INTO known FROM stratakv.models m WHERE m.fingerprint = of_fingerprint;
    IF NOT FOUND THEN
        PERFORM pg_advisory_xact_lock(hashtext('stratakv.models'));
        INSERT INTO stratakv.models AS m (fingerprint, name, weights_version, geometry, block_tokens, block_bytes, retired_at)
        VALUES (of_fingerprint, of_name, of_version, of_geometry, tokens, bytes, (
            SELECT min(other.retired_at) FROM stratakv.models other
            WHERE other.name = of_name AND other.weights_version = of_version
        ))
        ON CONFLICT (fingerprint) DO UPDATE SET name = m.name
        RETURNING * INTO known;
        FOREACH kind IN ARRAY ARRAY['prefixes', 'blocks'] LOOP
            IF to_regclass(format('stratakv.%I', kind || '_' || known.id)) IS NULL THEN
                EXECUTE format('CREATE TABLE stratakv.%I (LIKE stratakv.%I INCLUDING ALL)', kind || '_' || known.id, kind);
                EXECUTE format(
                    'ALTER TABLE stratakv.%I ATTACH PARTITION stratakv.%I FOR VALUES IN (%s)',
                    kind, kind || '_' || known.id, known.id
                );
            END IF;
        END LOOP;
    END IF;
    RETURN QUERY SELECT known.id, known.retired_at IS NOT NULL;
END $$;

-- Retires a version of a model's weights: one transaction, after which no node serves it, as soon as it hears of it or looks.
-- Its rows are nobody's from then on; `clean_retired` removes them.
CREATE FUNCTION stratakv.retire(of_name text, of_version text) RETURNS bigint LANGUAGE sql AS $$
    WITH retired AS (
        UPDATE stratakv.models SET retired_at = now()
        WHERE name = of_name AND weights_version = of_version AND retired_at IS NULL RETURNING id
    ), noted AS (
        INSERT INTO stratakv.events (kind, model) SELECT 'retired', id FROM retired
    ), told AS (
        SELECT pg_notify('stratakv', 'retired')
    )
    SELECT (SELECT count(*) FROM retired) FROM told
$$;

-- Takes that back.
CREATE FUNCTION stratakv.restore(of_name text, of_version text) RETURNS bigint LANGUAGE sql AS $$
    WITH restored AS (
        UPDATE stratakv.models SET retired_at = NULL
        WHERE name = of_name AND weights_version = of_version AND retired_at IS NOT NULL RETURNING id
    ), noted AS (
        INSERT INTO stratakv.events (kind, model) SELECT 'restored', id FROM restored
    ), told AS (
        SELECT pg_notify('stratakv', 'restored')
    )
    SELECT (SELECT count(*) FROM restored) FROM told
$$;

-- Removes rows of versions that are retired.
CREATE FUNCTION stratakv.clean_retired() RETURNS void LANGUAGE sql AS $$
    DELETE FROM stratakv.prefixes p USING stratakv.models m WHERE m.id = p.model AND m.retired_at IS NOT NULL;
    DELETE FROM stratakv.blocks b USING stratakv.models m WHERE m.id = b.model AND m.retired_at IS NOT NULL;
$$;

-- Which nodes hold how much of a prefix: its leading blocks, and how many of those are in RAM.
CREATE FUNCTION stratakv.holders(of_model integer, names uuid[])
RETURNS TABLE (node text, blocks bigint, in_ram bigint, seen_at timestamptz) LANGUAGE sql STABLE AS $$
    SELECT n.name, count(*), count(*) FILTER (WHERE held.tier = 0), n.seen_at
    FROM (
        SELECT b.node, asked.nth, min(b.tier) AS tier,
            row_number() OVER (PARTITION BY b.node ORDER BY asked.nth) AS rank
        FROM unnest(names) WITH ORDINALITY AS asked (name, nth)
        JOIN stratakv.blocks b ON b.name = asked.name AND b.model = of_model
        GROUP BY b.node, asked.nth
    ) AS held JOIN stratakv.nodes n ON n.id = held.node
    WHERE held.nth = held.rank AND n.closed_at IS NULL
        AND EXISTS (SELECT FROM stratakv.models m WHERE m.id = of_model AND m.retired_at IS NULL)
    GROUP BY n.id
$$;

-- The names in a chain of them.
CREATE FUNCTION stratakv.names(chain bytea) RETURNS uuid[] LANGUAGE sql IMMUTABLE AS $$
    SELECT array_agg(encode(substring(chain FROM 16 * nth + 1 FOR 16), 'hex')::uuid ORDER BY nth)
    FROM generate_series(0, length(chain) / 16 - 1) AS nth
$$;

-- How many leading blocks of a chain each node holds, by tier.
CREATE FUNCTION stratakv.places(of_model integer, chain bytea) RETURNS jsonb LANGUAGE sql STABLE AS $$
    SELECT jsonb_object_agg(node, tiers) FROM (
        SELECT n.name AS node, jsonb_object_agg((ARRAY['ram', 'ssd'])[counted.tier + 1], counted.blocks) AS tiers
        FROM (
            SELECT held.node, held.tier, count(*) AS blocks
            FROM (
                SELECT b.node, b.tier, asked.nth, row_number() OVER (PARTITION BY b.node, b.tier ORDER BY asked.nth) AS rank
                FROM unnest(stratakv.names(chain)) WITH ORDINALITY AS asked (name, nth)
                JOIN stratakv.blocks b ON b.name = asked.name AND b.model = of_model
            ) AS held WHERE held.nth = held.rank
            GROUP BY held.node, held.tier
        ) AS counted JOIN stratakv.nodes n ON n.id = counted.node WHERE n.closed_at IS NULL
        GROUP BY n.id
    ) AS by_node
$$;

-- What each node holds.
CREATE VIEW stratakv.holdings AS
SELECT n.name AS node, m.name AS model, m.weights_version, (ARRAY['ram', 'ssd'])[b.tier + 1] AS tier,
    count(*) AS blocks, count(*) * m.block_bytes AS bytes, count(*) * m.block_tokens AS tokens, n.seen_at
FROM stratakv.blocks b JOIN stratakv.nodes n ON n.id = b.node JOIN stratakv.models m ON m.id = b.model
WHERE n.closed_at IS NULL AND m.retired_at IS NULL
GROUP BY n.id, m.id, b.tier;

-- Prefixes, with what they are worth now, and on how many nodes their last block is.
CREATE VIEW stratakv.hottest AS
SELECT m.name AS model, m.weights_version, p.tenant, p.adapter, p.name AS prefix, p.tokens, p.uses,
    stratakv.uses_now(p.heat) AS heat, p.since, p.used,
    (SELECT count(DISTINCT b.node) FROM stratakv.blocks b WHERE b.name = p.name AND b.model = p.model) AS nodes, p.heat AS score
FROM stratakv.prefixes p JOIN stratakv.models m ON m.id = p.model
WHERE m.retired_at IS NULL;

-- What tenants asked of models, by hour.
CREATE VIEW stratakv.usage AS
SELECT date_trunc('hour', e.at) AS hour, m.name AS model, m.weights_version, e.tenant, sum(e.asked_blocks) AS asked_blocks,
    sum(e.hit_blocks) AS hit_blocks, sum(e.hit_blocks)::double precision / nullif(sum(e.asked_blocks), 0) AS hit_ratio,
    sum(e.loaded_tokens) AS loaded_tokens, sum(e.put_blocks) AS put_blocks, sum(e.put_bytes) AS put_bytes
FROM stratakv.events e JOIN stratakv.models m ON m.id = e.model
WHERE e.kind = 'usage'
GROUP BY 1, m.id, e.tenant;

-- Versions of weights, and where they are still cached.
CREATE VIEW stratakv.versions AS
SELECT m.name AS model, m.weights_version, m.registered_at, m.retired_at,
    (SELECT count(*) FROM stratakv.prefixes p WHERE p.model = m.id) AS prefixes,
    (SELECT array_agg(DISTINCT n.name) FROM stratakv.blocks b JOIN stratakv.nodes n ON n.id = b.node WHERE b.model = m.id) AS nodes
FROM stratakv.models m;
