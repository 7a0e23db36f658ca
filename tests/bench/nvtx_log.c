/* An NVTX tool in its smallest form: writes every range that a process pushes and pops to the file named by NVTX_LOG.

   NVTX loads it from NVTX_INJECTION64_PATH on the first NVTX call. The layout of what passes between the two is fixed by
   the ABI of NVTX 3 and declared here, so that no NVTX header is needed. Lines, separated by tabs:
     push  thread  domain  payload  message
     pop   thread  domain                                                                                              */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { kCallbacksTable = 1, kModuleCore2 = 5 };
enum { kPushEx = 4, kPop = 5, kRegisterStringA = 10, kDomainCreateA = 12 };
enum { kMessageAscii = 1, kMessageRegistered = 3 };

typedef void (*Function)(void);

typedef struct {
  size_t struct_size;
  int (*get_module_function_table)(int module, Function*** table, unsigned* size);
} Callbacks;

typedef struct {
  uint16_t version, size;
  uint32_t category;
  int32_t color_type;
  uint32_t color;
  int32_t payload_type, reserved;
  int64_t payload;
  int32_t message_type;
  const char* message; /* text, or the handle that register_string gave: the text too */
} Event;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static FILE* log_file;

static const char* create_domain(const char* name) { return strdup(name); }

static const char* register_string(const char* domain, const char* text) {
  (void)domain;
  return strdup(text);
}

static int push(const char* domain, const Event* event) {
  int text = event->message_type == kMessageAscii || event->message_type == kMessageRegistered;
  pthread_mutex_lock(&lock);
  fprintf(log_file, "push\t%ld\t%s\t%lld\t%s\n", (long)syscall(SYS_gettid), domain ? domain : "",
          (long long)(event->payload_type ? event->payload : -1), text ? event->message : "");
  fflush(log_file);
  pthread_mutex_unlock(&lock);
  return 0;
}

static int pop(const char* domain) {
  pthread_mutex_lock(&lock);
  fprintf(log_file, "pop\t%ld\t%s\n", (long)syscall(SYS_gettid), domain ? domain : "");
  fflush(log_file);
  pthread_mutex_unlock(&lock);
  return 0;
}

int InitializeInjectionNvtx2(const void* (*get_export_table)(uint32_t id)) {
  const Callbacks* callbacks = get_export_table(kCallbacksTable);
  const char* path = getenv("NVTX_LOG");
  Function** table;
  unsigned size;
  if (!callbacks || !path || !callbacks->get_module_function_table(kModuleCore2, &table, &size)) return 0;
  if (size <= kDomainCreateA || !(log_file = fopen(path, "w"))) return 0;
  *table[kPushEx] = (Function)push;
  *table[kPop] = (Function)pop;
  *table[kRegisterStringA] = (Function)register_string;
  *table[kDomainCreateA] = (Function)create_domain;
  return 1;
}
