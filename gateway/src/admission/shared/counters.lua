-- Counters that several gateways share. What is written here is `admission/core` again, in the store's own language, so that
-- one call looks at all of a request's counters and takes from all of them or from none; a test plays the same histories
-- through both. Whole numbers below 2^53, times in milliseconds by the store's clock, no command newer than Redis 6.2.
--
-- KEYS: counters. ARGV: what to do, a gateway, its connection's number, how long it is believed to live without a sign,
-- then what each of the functions at the end says. All keys have one hash tag, so that they are in one slot. This half is how
-- counters count.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local doing, gateway, connection, life = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local HOUR, DAY = 3600000, 86400000

-- The first place from 1 to `count` for which `is_there` holds, or the one after.
local function place(count, is_there)
  local at = 1
  while at <= count and not is_there(at) do at = at + 1 end
  return at
end

local function sum(amounts)
  local all = 0
  for _, amount in pairs(amounts) do all = all + amount end
  return all
end

-- Each kind of counter: `new` of what is asked; `refresh` to now and the asked limit; how much `room` there is; `wait` until
-- there is so much, -1 for ever, -2 until somebody ends; `take`, which gives a mark; `settle`; `state`, which is used, held,
-- remaining, and when all of it is there again; and how long it must be `kept`.

-- Evenly refilled. `level` and peaks are in units of which one is `window`: a millisecond refills `limit` of them.
local bucket = {}

function bucket.new(ask)
  return { limit = ask.limit, window = ask.from, level = ask.limit * ask.from, at = now, last = 0, held = 0, peaks = {} }
end

-- Makes one peak of those before `to`, or none if nobody needs it any more. A peak: its last mark, level, open grants.
local function merge(peaks, from, to, level)
  if from >= to then return peaks end
  local merged, open = {}, 0
  for at = 1, from - 1 do merged[at] = peaks[at] end
  for at = from, to - 1 do open = open + peaks[at][3] end
  if open > 0 then merged[#merged + 1] = { peaks[to - 1][1], level, open } end
  for at = to, #peaks do merged[#merged + 1] = peaks[at] end
  return merged
end

function bucket.refill(counter)
  if now < counter.at then return end
  local peaks = counter.peaks
  counter.level = math.min(counter.level + (now - counter.at) * counter.limit, counter.limit * counter.window)
  counter.at = now
  local from = place(#peaks, function(at) return peaks[at][2] <= counter.level end)
  counter.peaks = merge(peaks, from, #peaks + 1, counter.level)
end

function bucket.refresh(counter, ask)
  bucket.refill(counter)
  if counter.limit == ask.limit then return end
  local change = (ask.limit - counter.limit) * counter.window
  counter.level = math.max(counter.level + change, math.min(counter.level, 0))
  counter.limit = ask.limit
  for _, peak in ipairs(counter.peaks) do peak[2] = math.max(peak[2] + change, counter.level) end
  counter.changed = true
end

function bucket.room(counter)
  return math.floor(counter.level / counter.window)
end

function bucket.wait(counter, ask, amount)
  if amount > counter.limit then return -1 end
  return math.ceil((amount * counter.window - counter.level) / counter.limit)
end

function bucket.take(counter, ask, amount)
  counter.level = counter.level - amount * counter.window
  counter.last = counter.last + 1
  counter.held = counter.held + amount
  counter.peaks[#counter.peaks + 1] = { counter.last, counter.level, 1 }
  return counter.last
end

function bucket.settle(counter, mark, amount, used)
  bucket.refill(counter)
  counter.held = math.max(counter.held - amount, 0)
  local peaks = counter.peaks
  local mine = place(#peaks, function(at) return peaks[at][1] >= mark end)
  local peak = peaks[mine]
  if not peak then return end
  peak[3] = math.max(peak[3] - 1, 0)
  -- Had it not been taken, the bucket would have run over at its peak.
  local back = math.min((amount - used) * counter.window, counter.limit * counter.window - peak[2])
  counter.level = counter.level + back
  if back > 0 then
    for at = mine, #peaks do peaks[at][2] = peaks[at][2] + back end
    local from = place(mine - 1, function(at) return peaks[at][2] <= peak[2] end)
    counter.peaks = merge(peaks, from, mine + 1, peak[2])
  elseif peak[3] == 0 then
    table.remove(peaks, mine)
  end
end

function bucket.state(counter)
  local remaining = math.max(bucket.room(counter), 0)
  local gone = counter.limit - math.min(remaining, counter.limit)
  local held = math.min(counter.held, gone)
  local empty = counter.limit * counter.window - counter.level
  return gone - held, held, remaining, math.ceil(math.max(empty, 0) / counter.limit)
end

function bucket.kept(counter)
  local _, _, _, reset = bucket.state(counter)
  return reset + counter.window + HOUR
end

-- At most the limit in every window: slices of a 64th of it, of which the last 65 count. A slice: its number, and what was
-- taken in it.
local SLICES = 65
local sliding = {}

function sliding.new(ask)
  return { limit = ask.limit, window = ask.from, newest = 0, held = 0, slices = {} }
end

function sliding.refresh(counter, ask)
  counter.limit = ask.limit
end

local function number(counter)
  return math.max(math.floor(now * (SLICES - 1) / counter.window), counter.newest)
end

local function forgotten_in(counter, slice)
  return math.ceil(((slice + SLICES) * counter.window - now * (SLICES - 1)) / (SLICES - 1))
end

local function counted(counter)
  local from, all = number(counter) - SLICES, 0
  for _, slice in ipairs(counter.slices) do
    if slice[1] > from then all = all + slice[2] end
  end
  return all
end

local function add(counter, at, amount)
  local slices = {}
  for _, slice in ipairs(counter.slices) do
    if slice[1] > at - SLICES then slices[#slices + 1] = slice end
  end
  local last = slices[#slices]
  if last and last[1] == at then last[2] = last[2] + amount else slices[#slices + 1] = { at, amount } end
  counter.slices = slices
end

function sliding.room(counter)
  return counter.limit - counted(counter)
end

function sliding.wait(counter, ask, amount)
  if amount > counter.limit then return -1 end
  local left, from, wait = counted(counter), number(counter) - SLICES, 0
  for _, slice in ipairs(counter.slices) do
    if slice[1] > from then
      left, wait = left - slice[2], forgotten_in(counter, slice[1])
      if left + amount <= counter.limit then break end
    end
  end
  return wait
end

function sliding.take(counter, ask, amount)
  counter.newest = number(counter)
  add(counter, counter.newest, amount)
  counter.held = counter.held + amount
  return counter.newest
end

function sliding.settle(counter, mark, amount, used)
  counter.newest = number(counter)
  counter.held = math.max(counter.held - amount, 0)
  if used > amount then
    add(counter, counter.newest, used - amount)
    return
  end
  for _, slice in ipairs(counter.slices) do
    if slice[1] == mark then slice[2] = math.max(slice[2] - (amount - used), 0) end
  end
end

function sliding.state(counter)
  local taken, from, reset = counted(counter), number(counter) - SLICES, 0
  for _, slice in ipairs(counter.slices) do
    if slice[1] > from and slice[2] > 0 then reset = forgotten_in(counter, slice[1]) end
  end
  local held = math.min(counter.held, taken)
  return taken - held, held, math.max(counter.limit - taken, 0), reset
end

function sliding.kept(counter)
  return counter.window + HOUR
end

-- Days or months. Of each gateway a period remembers what it has used, at least what its own books say: that may be told
-- again and again, and is where it was forgotten; what it has on lease; and what it had when it died, which counts until it
-- comes again and its books say more. What is reserved by grants is `held`.
local PERIODS_MAX = 3
local calendar = {}

local function period(ask)
  return { from = ask.from, to = ask.to, held = 0, used = {}, leased = {}, lost = {} }
end

function calendar.new(ask)
  return { periods = { period(ask) } }
end

-- A period before all that are known is a clock's mistake and counts as the first of them.
local function find(counter, ask)
  local periods = counter.periods
  local at = place(#periods, function(at) return periods[at].from >= ask.from end)
  return at, periods[at] and (periods[at].from == ask.from or at == 1) and periods[at] or nil
end

function calendar.refresh(counter, ask)
  counter.limit = ask.limit
  local at, found = find(counter, ask)
  if not found then
    table.insert(counter.periods, at, period(ask))
    if #counter.periods > PERIODS_MAX then table.remove(counter.periods, 1) end
    at, found = find(counter, ask)
  end
  if ask.books > 0 then found.used[gateway] = math.max(found.used[gateway] or 0, ask.books) end
  if ask.leased then
    found.leased[gateway] = ask.leased > 0 and ask.leased or nil
    found.lost[gateway] = nil
  end
end

local function gone(found)
  return sum(found.used) + sum(found.lost) + sum(found.leased) + found.held
end

function calendar.room(counter, ask)
  local _, found = find(counter, ask)
  return counter.limit - gone(found)
end

function calendar.wait(counter, ask, amount)
  if amount > counter.limit then return -1 end
  local _, found = find(counter, ask)
  return math.max(found.to - ask.at, 0)
end

function calendar.take(counter, ask, amount)
  local _, found = find(counter, ask)
  if ask.leased then
    found.leased[gateway] = (found.leased[gateway] or 0) + amount
  else
    found.held = found.held + amount
  end
  return found.from
end

function calendar.settle(counter, mark, amount, used)
  for _, found in ipairs(counter.periods) do
    if found.from == mark then
      found.held = math.max(found.held - amount, 0)
      if used > 0 then found.used[gateway] = (found.used[gateway] or 0) + used end
    end
  end
end

function calendar.lapse(counter, dead)
  for _, found in ipairs(counter.periods) do
    if found.leased[dead] then
      found.lost[dead] = (found.lost[dead] or 0) + found.leased[dead]
      found.leased[dead] = nil
    end
  end
end

function calendar.state(counter, ask)
  local _, found = find(counter, ask)
  local held = found.held + sum(found.leased)
  return sum(found.used) + sum(found.lost), held, math.max(counter.limit - gone(found), 0), math.max(found.to - ask.at, 0)
end

function calendar.kept(counter)
  return math.max(counter.periods[#counter.periods].to - now, 0) + 2 * DAY
end

-- Requests at a time.
local slots = {}

function slots.new(ask)
  return { held = 0, leased = {} }
end

function slots.refresh(counter, ask)
  counter.limit = ask.limit
  if ask.leased then counter.leased[gateway] = ask.leased > 0 and ask.leased or nil end
end

function slots.room(counter)
  return counter.limit - counter.held - sum(counter.leased)
end

function slots.wait(counter, ask, amount)
  return amount > counter.limit and -1 or -2
end

function slots.take(counter, ask, amount)
  if ask.leased then
    counter.leased[gateway] = (counter.leased[gateway] or 0) + amount
  else
    counter.held = counter.held + amount
  end
  return 0
end

function slots.settle(counter, mark, amount)
  counter.held = math.max(counter.held - amount, 0)
end

function slots.lapse(counter, dead)
  counter.leased[dead] = nil
end

function slots.state(counter)
  return 0, counter.held + sum(counter.leased), math.max(slots.room(counter), 0), 0
end

function slots.kept(counter)
  return DAY
end

local kinds = { b = bucket, x = sliding, c = calendar, s = slots }
