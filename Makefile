# coffer: encrypted volumes and secrets for containers.
#
# Variables: BUILD (directory, default build), CC, SAN (address,undefined or thread), WERROR (default -Werror).

BUILD   ?= build
# One name for the directory, however it is given: the dependency files hold it.
override BUILD := $(abspath $(BUILD))
BELOW := $(patsubst $(CURDIR)/%,%,$(BUILD))
CC      ?= gcc
SAN     ?=
WERROR  ?= -Werror
PREFIX  ?= /usr/local
DESTDIR ?=

PKGS     := libsodium jansson fuse3 libmicrohttpd libcurl libseccomp
CPPFLAGS := -D_GNU_SOURCE -D_FILE_OFFSET_BITS=64 -DFUSE_USE_VERSION=314 -Iinclude -I. $(shell pkg-config --cflags $(PKGS) 2>/dev/null)
CFLAGS   ?= -O2 -g
# Whoever gives CFLAGS gives optimisation and the like; these stay (without override make would drop them).
override CFLAGS += -std=gnu17 -Wall -Wextra $(WERROR) -fstack-protector-strong -fno-strict-aliasing -pthread
override LDFLAGS += -pthread -Wl,-z,relro,-z,now
LDLIBS   := $(shell pkg-config --libs $(PKGS) 2>/dev/null)
ifneq ($(SAN),)
override CFLAGS += -fsanitize=$(SAN) -fno-omit-frame-pointer
override LDFLAGS += -fsanitize=$(SAN)
else
CPPFLAGS += -D_FORTIFY_SOURCE=2
endif

PROGRAMS := coffer cofferd coffer-fs coffer-keyd
MAIN_coffer      := fs/cli/coffer.c
MAIN_cofferd     := fs/plugin/cofferd.c
MAIN_coffer-fs   := fs/mount/coffer-fs.c
MAIN_coffer-keyd := keystore/coffer-keyd.c
MAINS := $(foreach p,$(PROGRAMS),$(MAIN_$(p)))

obj = $(patsubst %.c,$(BUILD)/obj/%.o,$(1))
src = $(filter-out $(MAINS),$(wildcard $(1)/*.c))

LIBS := base volume keystore mount plugin cli
SRC_base     := $(call src,fs/base)
SRC_volume   := $(call src,fs/volume)
SRC_keystore := $(call src,keystore)
SRC_mount    := $(call src,fs/mount)
SRC_plugin   := $(call src,fs/plugin)
SRC_cli      := $(call src,fs/cli)
LIB_FILES := $(foreach l,$(LIBS),$(BUILD)/lib$(l).a)

TESTS := $(patsubst tests/unit/%.c,$(BUILD)/tests/%,$(wildcard tests/unit/test_*.c))
TEST_TOOLS := $(patsubst tests/%.c,$(BUILD)/tests/%,$(wildcard tests/crash/*.c tests/model/*.c tests/fs/*.c tests/attack/*.c tests/bench/*.c))
FUZZERS := $(patsubst tests/fuzz/%.c,$(BUILD)/fuzz/%,$(wildcard tests/fuzz/fuzz_*.c))

.PHONY: all help check tests fuzzers crash model clean install format lint layers bench soak
all: $(PROGRAMS:%=$(BUILD)/%) ## build the four programs into $(BUILD)/

help: ## this text
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile

tests: $(TESTS) $(TEST_TOOLS) ## build the unit tests and test tools
fuzzers: $(FUZZERS) ## build the fuzz targets (clang)

check: all tests ## build and run the unit tests
	@set -e; for t in $(TESTS); do $$t; done

crash: tests ## cut the power in two million states (about an hour on two cores)
	$(BUILD)/tests/crash/powercut --seed $$(date +%s) --distinct 2000000 --seconds 36000

model: tests ## ten million random operations against the plain model, then as many by four threads
	$(BUILD)/tests/model/model --seed $$(date +%s) --ops 10000000
	$(BUILD)/tests/model/model --seed $$(date +%s) --ops 10000000 --threads 4

define lib_rule
$(BUILD)/lib$(1).a: $(call obj,$(SRC_$(1)))
	@rm -f $$@
	ar rcs $$@ $$^
endef
$(foreach l,$(LIBS),$(eval $(call lib_rule,$(l))))

define program_rule
$(BUILD)/$(1): $(call obj,$(MAIN_$(1))) $(2)
	$$(CC) $$(CFLAGS) $$(LDFLAGS) -o $$@ $(call obj,$(MAIN_$(1))) $(2) $(3)
endef
L := $(BUILD)/lib
$(eval $(call program_rule,coffer,$(L)cli.a $(L)volume.a $(L)keystore.a $(L)base.a,$$$$(pkg-config --libs jansson libsodium libseccomp)))
$(eval $(call program_rule,cofferd,$(L)plugin.a $(L)base.a,$$$$(pkg-config --libs jansson libsodium libmicrohttpd libcurl)))
$(eval $(call program_rule,coffer-fs,$(L)mount.a $(L)volume.a $(L)base.a,$$$$(pkg-config --libs fuse3 libsodium libseccomp)))
$(eval $(call program_rule,coffer-keyd,$(L)keystore.a $(L)base.a,$$$$(pkg-config --libs jansson libsodium libseccomp)))

$(BUILD)/obj/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS) $(CFLAGS) -MMD -MP -c -o $@ $<

ALL_LIBS := $(L)mount.a $(L)plugin.a $(L)cli.a $(L)keystore.a $(L)volume.a $(L)base.a
$(BUILD)/tests/%: tests/unit/%.c $(ALL_LIBS)
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS) $(CFLAGS) -MMD -MP -MF $@.d $(LDFLAGS) -o $@ $< $(ALL_LIBS) -lcmocka $(LDLIBS)

$(BUILD)/tests/%: tests/%.c $(L)volume.a $(L)base.a
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS) $(CFLAGS) -MMD -MP -MF $@.d $(LDFLAGS) -o $@ $< $(L)volume.a $(L)base.a -Wl,--as-needed $(shell pkg-config --libs libsodium fuse3)

# All that a fuzz target needs is instrumented: the libraries once, for all targets.
FUZZ_FLAGS := -O1 -g -std=gnu17 -pthread -fsanitize=address,undefined
FUZZ_OBJ := $(patsubst %.c,$(BUILD)/fuzzobj/%.o,$(SRC_base) $(SRC_volume) $(SRC_keystore))
$(BUILD)/fuzzobj/%.o: %.c
	@mkdir -p $(@D)
	clang $(CPPFLAGS) $(FUZZ_FLAGS) -fsanitize=fuzzer-no-link -MMD -MP -c -o $@ $<

.SECONDARY: $(FUZZ_OBJ)
$(BUILD)/fuzz/%: tests/fuzz/%.c $(FUZZ_OBJ)
	@mkdir -p $(@D)
	clang $(CPPFLAGS) $(FUZZ_FLAGS) -fsanitize=fuzzer -o $@ $< $(FUZZ_OBJ) $(shell pkg-config --libs jansson libsodium libseccomp)

soak: all tests ## two hours of file operations on mounts, one of them while servers are killed (root)
	bash tests/fs/fsx.sh 3600
	bash tests/fs/stress.sh 3600

bench: all ## measure raw, gocryptfs and coffer (root)
	scripts/bench

layers: ## check that includes run downwards only
	scripts/check-layers

format: ## reformat all C files
	clang-format -i $$(git ls-files '*.c' '*.h')

lint: ## cppcheck and clang-tidy
	scripts/lint

install: all ## install programs into $(DESTDIR)$(PREFIX)
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/libexec/coffer
	install -m 755 $(BUILD)/coffer $(DESTDIR)$(PREFIX)/bin/
	install -m 755 $(BUILD)/cofferd $(BUILD)/coffer-fs $(BUILD)/coffer-keyd $(DESTDIR)$(PREFIX)/libexec/coffer/

clean: ## remove $(BUILD)/
	rm -rf $(BUILD)

ifneq ($(BELOW),$(BUILD))
$(BELOW)/%: $(BUILD)/% ;
endif

-include $(shell find $(BUILD) -name '*.d' 2>/dev/null)
