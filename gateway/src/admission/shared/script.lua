-- What a request, or a gateway ahead of its requests, asks of the counters above: the second half of the script.
local GRANTS, LEASES, ALIVE, CONNECTIONS = '{gg}grants:', '{gg}leases:', '{gg}alive', '{gg}connections'

-- What is there but is none of ours is written over.
local function load(key)
  local text = redis.pcall('GET', key)
  if type(text) ~= 'string' then return nil end
  local fine, counter = pcall(cmsgpack.unpack, text)
  return fine and type(counter) == 'table' and counter or nil
end

local function save(key, counter, kept)
  counter.changed = nil
  redis.call('SET', key, cmsgpack.pack(counter), 'PX', kept)
end

-- Ends a grant: a list of key, kind, mark and amount for each of its counters. Without what was used, all of it was.
local function settle(grant, used)
  for at, part in ipairs(grant) do
    local key, kind, mark, amount = part[1], kinds[part[2]], part[3], part[4]
    local counter = load(key)
    if counter then
      kind.settle(counter, mark, amount, used and used[at] or amount)
      redis.call('SET', key, cmsgpack.pack(counter), 'KEEPTTL')
    end
  end
end

-- What a gateway held that gives no sign of life counts as used, as its ledger will say when it recovers; places are free.
local REAPED_MAX = 200

local function bury(dead)
  local me = gateway
  gateway = dead
  local grants = redis.call('HRANDFIELD', GRANTS .. dead, REAPED_MAX, 'WITHVALUES')
  for at = 1, #grants, 2 do
    redis.call('HDEL', GRANTS .. dead, grants[at])
    settle(cmsgpack.unpack(grants[at + 1]))
  end
  local leases = redis.call('HRANDFIELD', LEASES .. dead, REAPED_MAX, 'WITHVALUES')
  for at = 1, #leases, 2 do
    redis.call('HDEL', LEASES .. dead, leases[at])
    local counter = load(leases[at])
    if counter then
      kinds[leases[at + 1]].lapse(counter, dead)
      redis.call('SET', leases[at], cmsgpack.pack(counter), 'KEEPTTL')
    end
  end
  local is_over = #grants < 2 * REAPED_MAX and #leases < 2 * REAPED_MAX
  if is_over then
    redis.call('ZREM', ALIVE, dead)
    redis.call('HDEL', CONNECTIONS, dead)
  end
  gateway = me
  return is_over
end

local function bury_the_dead()
  for _, dead in ipairs(redis.call('ZRANGEBYSCORE', ALIVE, '-inf', now, 'LIMIT', 0, 1)) do bury(dead) end
end

-- A gateway's sign of life, the first on each connection. What is still on its way on an earlier one is void from then on.
local function live()
  redis.call('HSET', CONNECTIONS, gateway, connection)
  redis.call('ZADD', ALIVE, now + life, gateway)
  bury_the_dead()
  return { 1, now }
end

-- A gateway's life is over: it says so itself, in its next one. Also tells whether that was all, or it must say so again.
local function leave()
  return { 1, now, bury(gateway) and 1 or 0 }
end

-- grant, then for each counter: kind, limit, from and to (of a period; else its window), at (the gateway's own time, for
-- periods), the least and the most to take, whether the limit only warns, the gateway's books, and what it has on lease or
-- nothing. Gives for each what was taken and its state; or nothing was taken, and who is short, its state, and the wait.
local ASK_FIELDS = 10

local function reserve()
  local known = redis.call('HGET', CONNECTIONS, gateway)
  if known and tonumber(known) ~= connection then return { -1, now } end
  bury_the_dead()
  local grant, asks, counters = ARGV[5], {}, {}
  local short, longest
  for at, key in ipairs(KEYS) do
    local base = 5 + (at - 1) * ASK_FIELDS
    local ask = {
      kind = ARGV[base + 1], limit = tonumber(ARGV[base + 2]), from = tonumber(ARGV[base + 3]), to = tonumber(ARGV[base + 4]),
      at = tonumber(ARGV[base + 5]), least = tonumber(ARGV[base + 6]), most = tonumber(ARGV[base + 7]),
      warns = ARGV[base + 8] == '1', books = tonumber(ARGV[base + 9]), leased = tonumber(ARGV[base + 10]),
    }
    local kind = kinds[ask.kind]
    local counter = load(key) or kind.new(ask)
    kind.refresh(counter, ask)
    asks[at], counters[at] = ask, counter
    local room = kind.room(counter, ask)
    -- What asks for nothing always fits, but for a place where there are too many.
    if ask.least == 0 and (ask.leased or kind ~= slots) or ask.warns or ask.least <= room then
      ask.amount = math.min(ask.most, math.max(ask.least, room))
    else
      local wait = kind.wait(counter, ask, ask.least)
      local rank = wait == -1 and math.huge or wait
      if not short or rank > longest then short, longest = { at, wait }, rank end
    end
  end
  if short then
    -- Nothing is taken; but another limit refills at another pace from now on.
    for at, key in ipairs(KEYS) do
      if counters[at].changed then save(key, counters[at], kinds[asks[at].kind].kept(counters[at])) end
    end
    local at = short[1]
    local used, held, remaining, reset = kinds[asks[at].kind].state(counters[at], asks[at])
    return { 0, now, at - 1, used, held, remaining, reset, short[2] }
  end
  local reply, parts = { 1, now }, {}
  for at, key in ipairs(KEYS) do
    local ask, counter = asks[at], counters[at]
    local kind = kinds[ask.kind]
    if ask.amount > 0 or not ask.leased then
      local mark = kind.take(counter, ask, ask.amount)
      if not ask.leased then
        parts[#parts + 1] = { key, ask.kind, mark, ask.amount }
      elseif not kind.lapse then
        -- It comes back by itself: on lease is used.
        kind.settle(counter, mark, ask.amount, ask.amount)
      end
    end
    if ask.leased and kind.lapse then redis.call('HSET', LEASES .. gateway, key, ask.kind) end
    save(key, counter, kind.kept(counter))
    local used, held, remaining, reset = kind.state(counter, ask)
    for _, value in ipairs({ ask.amount, used, held, remaining, reset }) do reply[#reply + 1] = value end
  end
  if #parts > 0 then redis.call('HSET', GRANTS .. gateway, grant, cmsgpack.pack(parts)) end
  redis.call('ZADD', ALIVE, 'NX', now + life, gateway)
  return reply
end

-- For each grant: its name, how many counters, and for each what was used of it. One that is not known was settled before,
-- or buried.
local function settle_all()
  local at = 5
  while ARGV[at] do
    local name, count, used = ARGV[at], tonumber(ARGV[at + 1]), {}
    for part = 1, count do used[part] = tonumber(ARGV[at + 1 + part]) end
    at = at + 2 + count
    local grant = redis.call('HGET', GRANTS .. gateway, name)
    if grant then
      redis.call('HDEL', GRANTS .. gateway, name)
      settle(cmsgpack.unpack(grant), used)
    end
  end
  return { 1, now }
end

local todo = { live = live, leave = leave, reserve = reserve, settle = settle_all }
return todo[doing]()
